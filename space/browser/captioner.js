// Captions photos with what export.py wrote: the module's preprocessing and beam search, in the browser.
import * as ort from './runtime/ort.wasm.min.mjs';

const RUNTIME = new URL('./runtime/', import.meta.url);
const WASM = new URL('ort-wasm-simd-threaded.wasm.gz?v=1.30.0', RUNTIME);
const WASM_BYTES = 3_659_927; // for the progress bar
const [START, END, FIRST_WORD] = [1, 2, 4]; // 0 is <pad>, 3 is <unk>
const CACHE = 'storyteller';

// Loading ------------------------------------------------------------------------------------------

// Load the captioner in the folder `base`; progress(share) is called as bytes arrive.
export async function load(base, progress = () => {}) {
  const about = await (await fetch(new URL('captioner.json', base))).json();
  const total = WASM_BYTES + about.bytes.encoder + about.bytes.step;
  let received = 0;
  const count = bytes => progress((received += bytes) / total);
  const graph = name => download(new URL(`${name}.onnx?v=${about.version}`, base), count);
  const [wasm, encoder, step] = await Promise.all([
    download(WASM, count), graph('encoder'), graph('step'),
  ]);
  await dropOldVersions([WASM.href, `?v=${about.version}`]);
  // The host may not compress .wasm: it is stored gzipped, and unpacked here.
  const unpacked = new Response(wasm).body.pipeThrough(new DecompressionStream('gzip'));
  ort.env.wasm.wasmBinary = await new Response(unpacked).arrayBuffer();
  ort.env.wasm.wasmPaths = RUNTIME.href;
  // Threads need headers that not every host sends; one is fast enough for one photo.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const options = {executionProviders: ['wasm'], graphOptimizationLevel: 'all'};
  return {
    ...about,
    encoder: await ort.InferenceSession.create(new Uint8Array(encoder), options),
    step: await ort.InferenceSession.create(new Uint8Array(step), options),
  };
}

// Fetch a file that never changes under its address; once loaded, it is there without a network.
async function download(url, count) {
  const cache = await self.caches?.open(CACHE).catch(() => undefined); // no cache in some contexts
  const stored = await cache?.match(url);
  const response = stored ?? (await fetch(url));
  if (!response.ok) throw new Error(`${url.pathname} could not be loaded (${response.status})`);
  const chunks = [];
  const reader = response.body.getReader();
  for (;;) {
    const {done, value} = await reader.read();
    if (done) break;
    chunks.push(value);
    count(value.length);
  }
  const blob = new Blob(chunks);
  if (cache && !stored) await cache.put(url, new Response(blob)).catch(() => {}); // a full disk
  return blob.arrayBuffer();
}

async function dropOldVersions(wanted) {
  const cache = await self.caches?.open(CACHE).catch(() => undefined);
  for (const {url} of (await cache?.keys()) ?? []) {
    if (!wanted.some(end => url.endsWith(end))) await cache.delete(url);
  }
}

// Pixels -------------------------------------------------------------------------------------------

// Decode a photo and resize it to (3, side, side) bytes, as the module's `preprocess` does.
export async function pixels(blob, {side, preprocessing}) {
  const image = await decode(blob);
  const {width, height} = image;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.fillStyle = 'white'; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(image, 0, 0);
  image.close();
  const [left, top, wide, high] = preprocessing === 'crop' ? middle(width, height) : [0, 0, width, height];
  return resize(context.getImageData(left, top, wide, high), side);
}

async function decode(blob) {
  // Upright, and wide-gamut colours in sRGB.
  const options = {
    imageOrientation: 'from-image', colorSpaceConversion: 'default', premultiplyAlpha: 'none',
  };
  try {
    return await createImageBitmap(blob, options);
  } catch {
    throw new Error(`${blob.name ?? 'This'} is not a photo that this browser can read.`);
  }
}

// The middle square that torchvision's classifiers see.
function middle(width, height) {
  const edge = Math.max(1, Math.floor((224 * Math.min(height, width)) / 232));
  return [Math.floor((width - edge) / 2), Math.floor((height - edge) / 2), edge, edge];
}

// Resize RGBA bytes to the bit as torch's bilinear interpolation with antialias does for bytes: two
// passes of a triangle filter in whole numbers, rows first; shrunk before stretched, as the module
// does. A canvas resizes otherwise, by which one photo in six would get another caption.
export function resize({data, width, height}, side) {
  let image = {data, width, height, channels: 4};
  image = pass(image, Math.min(width, side), true);
  image = pass(image, Math.min(height, side), false);
  image = pass(image, side, true);
  image = pass(image, side, false);
  const out = new Uint8Array(3 * side * side); // (3, side, side)
  for (let channel = 0; channel < 3; channel++) {
    for (let i = 0; i < side * side; i++) {
      out[channel * side * side + i] = image.data[i * image.channels + channel];
    }
  }
  return out;
}

// Resize an image (height, width, channels) along one axis: across, or down. Keeps red, green, blue.
function pass({data, width, height, channels}, to, across) {
  const from = across ? width : height;
  if (from === to) return {data, width, height, channels};
  const {bits, half, rows} = filter(from, to);
  const [newWidth, newHeight] = across ? [to, height] : [width, to];
  const stride = across ? channels : width * channels; // from one weighted pixel to the next
  const out = new Uint8ClampedArray(newHeight * newWidth * 3);
  let at = 0;
  for (let y = 0; y < newHeight; y++) {
    for (let x = 0; x < newWidth; x++) {
      const {first, weights} = rows[across ? x : y];
      let place = across ? (y * width + first) * channels : (first * width + x) * channels;
      let red = half, green = half, blue = half;
      for (let i = 0; i < weights.length; i++, place += stride) {
        red += weights[i] * data[place];
        green += weights[i] * data[place + 1];
        blue += weights[i] * data[place + 2];
      }
      out[at++] = red >> bits;
      out[at++] = green >> bits;
      out[at++] = blue >> bits;
    }
  }
  return {data: out, width: newWidth, height: newHeight, channels: 3};
}

// The weights by which `from` pixels become `to`, as whole numbers of as many bits as fit in 16.
function filter(from, to) {
  const scale = from / to;
  const support = Math.max(1, scale);
  const rows = [];
  let largest = 0;
  for (let i = 0; i < to; i++) {
    const centre = scale * (i + 0.5);
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(from, Math.trunc(centre + support + 0.5));
    const weights = [];
    for (let j = first; j < last; j++) {
      weights.push(Math.max(0, 1 - Math.abs((j - centre + 0.5) / support)));
    }
    const sum = weights.reduce((a, b) => a + b);
    rows.push({first, weights: weights.map(weight => weight / sum)});
    for (const weight of rows[i].weights) largest = Math.max(largest, weight);
  }
  let bits = 0;
  while (bits < 22 && Math.trunc(0.5 + largest * 2 ** (bits + 1)) < 2 ** 15) bits++;
  for (const row of rows) {
    row.weights = Int32Array.from(row.weights, weight => Math.trunc(0.5 + weight * 2 ** bits));
  }
  return {bits, rows, half: 1 << (bits - 1)};
}

// Beam search --------------------------------------------------------------------------------------

// The captions of one photo, best first: [{ids, score, attention}], as the module's `beam_search`.
export async function beamSearch(captioner, state, given = {}) {
  const decoding = {...captioner.decoding, ...given};
  const width = decoding.method === 'greedy' ? 1 : decoding.beam_width;
  const names = captioner.state.caption;
  let beams = [{ids: [], score: 0, attention: []}];
  let ended = [];
  let caption = state.caption;
  for (let length = 1; length <= decoding.max_length; length++) {
    const words = BigInt64Array.from(beams, beam => BigInt(beam.ids.at(-1) ?? START));
    const feeds = {words: new ort.Tensor('int64', words, [beams.length]), ...caption, ...state.photo};
    const outputs = await captioner.step.run(feeds);
    const {ending, going} = extend(beams, outputs, width, decoding, length);

    const normal = length ** decoding.length_preference;
    ended = best([...ended, ...ending.map(beam => ({...beam, score: beam.score / normal}))], width);
    const unfinished = going.map(beam => ({...beam, score: beam.score / normal}));
    const worst = ended.length === width ? ended.at(-1).score : -Infinity;
    const done = worst >= (unfinished[0]?.score ?? -Infinity);
    if (done || length === decoding.max_length) return ended.length ? ended : unfinished;

    const parents = going.map(beam => beam.parent);
    caption = {};
    for (const name of names) caption[name] = takeRows(outputs[`next_${name}`], parents);
    beams = going;
  }
}

// Encode a photo's pixels to the state before the first word.
export async function start(captioner, photo) {
  const {caption: names, photo: photoNames, empty} = captioner.state;
  const size = [1, 3, captioner.side, captioner.side];
  const outputs = await captioner.encoder.run({photo: new ort.Tensor('uint8', photo, size)});
  const state = {caption: {}, photo: {}, novelty: outputs.novelty?.data[0]};
  for (const name of photoNames) state.photo[name] = outputs[name];
  for (const name of names) {
    state.caption[name] = outputs[name]
      ?? new ort.Tensor('float32', new Float32Array(0), empty[name]);
  }
  return state;
}

// Continue each partial caption by a word. Returns those that end here, if they are among the best
// continuations, and the best `width` that go on, best first.
function extend(beams, {logits, weights}, width, decoding, length) {
  const [, vocabulary] = logits.dims;
  const ending = [];
  const continued = [];
  beams.forEach((beam, parent) => {
    const row = logits.data.subarray(parent * vocabulary, (parent + 1) * vocabulary);
    if (decoding.no_repeat && length > 1) forbidRepeats(row, beam.ids, decoding.no_repeat);
    const offset = beam.score - logSumExp(row);
    const attention = weights ? [...beam.attention, takeRow(weights, parent)] : [];
    ending.push({ids: [...beam.ids, END], score: row[END] + offset, attention});
    for (const id of largest(row, width)) {
      continued.push({ids: [...beam.ids, id], score: row[id] + offset, attention, parent});
    }
  });
  const going = best(continued, width);
  // A caption ends if that is among the best continuations, once it may or nothing can follow.
  const mayEnd = length > decoding.min_length || !going.length;
  const possible = mayEnd ? ending.filter(beam => beam.score > -Infinity) : [];
  const count = Math.min(width, beams.length * Math.min(width, vocabulary));
  const worst = best([...going, ...possible], count)[count - 1]?.score ?? -Infinity;
  return {ending: possible.filter(beam => beam.score >= worst), going};
}

const best = (beams, count) => beams.sort((a, b) => b.score - a.score).slice(0, count);

// Rule out words that would repeat `n` words of a caption, or one of its last two.
function forbidRepeats(row, ids, n) {
  for (const id of ids.slice(-2)) row[id] = -Infinity;
  const last = ids.slice(ids.length - n + 1).join();
  for (let i = 0; i + n <= ids.length; i++) {
    if (ids.slice(i, i + n - 1).join() === last) row[ids[i + n - 1]] = -Infinity;
  }
}

function logSumExp(row) {
  let top = -Infinity;
  for (const value of row) if (value > top) top = value;
  let sum = 0;
  for (const value of row) sum += Math.exp(value - top);
  return top + Math.log(sum);
}

// The ids of the `count` likeliest words, likeliest first; special ones are never generated.
function largest(row, count) {
  const ids = [];
  for (let id = FIRST_WORD; id < row.length; id++) {
    if (row[id] === -Infinity || (ids.length === count && row[id] <= row[ids.at(-1)])) continue;
    let place = ids.length;
    while (place && row[ids[place - 1]] < row[id]) place--;
    ids.splice(place, 0, id);
    ids.length = Math.min(ids.length, count);
  }
  return ids;
}

function takeRow(tensor, row) {
  const size = tensor.data.length / tensor.dims[0];
  return tensor.data.slice(row * size, (row + 1) * size);
}

function takeRows(tensor, rows) {
  const size = tensor.data.length / tensor.dims[0];
  const data = new Float32Array(rows.length * size);
  rows.forEach((row, i) => data.set(tensor.data.subarray(row * size, (row + 1) * size), i * size));
  return new ort.Tensor('float32', data, [rows.length, ...tensor.dims.slice(1)]);
}

// Captions -----------------------------------------------------------------------------------------

// Write words as a sentence, as the module's `Vocab.sentence` does, by the rules it goes by.
export function sentence(words, {forms, joined, brackets, han, unspaced}) {
  const written = words.map(word => (Object.hasOwn(forms, word) ? forms[word] : word));
  let text = written.join(' ').replace(new RegExp(joined, 'gu'), '');
  for (const [name, sign] of Object.entries(brackets)) text = text.replaceAll(name, sign);
  const [first = '', ...rest] = text; // characters, also of two UTF-16 units
  text = first.toUpperCase() + rest.join('');
  const last = rest.at(-1) ?? first;
  if (!text || '.!?'.includes(last)) return text;
  if (new RegExp(`[${han}]`, 'u').test(last)) return `${text}\u3002`;
  return new RegExp(`[${unspaced}]`, 'u').test(last) ? text : `${text}.`;
}

// How sure a caption is, 0 to 1, as the module's `confidence`; undefined without a calibration.
function confidence(calibration, score, novelty) {
  if (!calibration) return undefined;
  const familiar = interpolate(novelty, calibration.novelty, [1, 0]);
  return familiar * interpolate(score, calibration.scores, calibration.shares);
}

// Between points of ascending xs, constant beyond them.
function interpolate(x, xs, ys) {
  const next = xs.findIndex(value => value > x);
  if (next === 0) return ys[0];
  if (next < 0) return ys.at(-1);
  const share = (x - xs[next - 1]) / (xs[next] - xs[next - 1]);
  return ys[next - 1] + share * (ys[next] - ys[next - 1]);
}

// Caption one photo: its caption, the others with their scores, the attention of each word, the time.
export async function caption(captioner, blob, decoding = {}) {
  const began = performance.now();
  const state = await start(captioner, await pixels(blob, captioner));
  const hypotheses = await beamSearch(captioner, state, decoding);
  const words = hypotheses.map(({ids}) => ids.filter(id => id >= FIRST_WORD).map(id => captioner.words[id]));
  const alternatives = hypotheses.map(({score}, i) => ({text: sentence(words[i], captioner.sentences), score}));
  // At the default length_preference, as confidence looks it up.
  const usual = captioner.decoding.length_preference;
  const power = (decoding.length_preference ?? usual) - usual;
  const score = hypotheses[0].score * hypotheses[0].ids.length ** power;
  return {
    ...alternatives[0],
    words: words[0],
    alternatives,
    attention: hypotheses[0].attention.slice(0, words[0].length),
    confidence: confidence(captioner.calibration, score, state.novelty),
    seconds: (performance.now() - began) / 1000,
  };
}
