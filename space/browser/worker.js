// Captions photos beside the page, which so never freezes. Messages in: {id, base} to load a
// captioner, {id, blob, decoding} to caption a photo; out: {id, progress}, {id, result}, {id, error}.
import {caption, load} from './captioner.js';

let captioner;

async function answer({id, base, blob, decoding}) {
  if (base) {
    captioner = await load(base, progress => postMessage({id, progress}));
    const {dataset, decoding: defaults, facts, language, precision, examples} = captioner;
    return {dataset, decoding: defaults, facts, language, precision, examples};
  }
  if (!captioner) throw new Error('The captioner is not loaded: reload the page.');
  return caption(captioner, blob, decoding);
}

let last = Promise.resolve(); // one photo at a time

self.onmessage = ({data}) => {
  last = last.then(async () => {
    try {
      postMessage({id: data.id, result: await answer(data)});
    } catch (error) {
      postMessage({id: data.id, error: error.message ?? String(error)});
    }
  });
};
