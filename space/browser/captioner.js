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

// Decode a photo and resize all of it to (3, side, side) bytes, as the module's `preprocess` does.
export async function pixels(blob, side) {
  const image = await decode(blob);
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.fillStyle = 'white'; // behind what is transparent
  context.fillRect(0, 0, image.width, image.height);
  context.drawImage(image, 0, 0);
  const {data, width, height} = context.getImageData(0, 0, image.width, image.height);
  image.close();
  return resize(data, width, height, side);
}

async function decode(blob) {
  // As stored: a colour profile would change the levels that the captioner was trained on.
  const options = {
    imageOrientation: 'from-image', colorSpaceConversion: 'none', premultiplyAlpha: 'none',
  };
  try {
    return await createImageBitmap(blob, options);
  } catch {
    throw new Error(blob.name
      ? `${blob.name} is not a photo that this browser can read.`
      : 'This is not a photo that this browser can read.');
  }
}

// Resize RGBA bytes to the bit as torch's bilinear interpolation with antialias does for bytes: two
// passes of a triangle filter in whole numbers, rows first. A canvas resizes otherwise, by which one
// photo in six would get another caption.
export function resize(data, width, height, side) {
  const across = filter(width, side);
  const down = filter(height, side);
  const middle = new Uint8ClampedArray(height * side * 3); // (height, side, 3)
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < side; x++) {
      const {first, weights} = across.rows[x];
      let red = across.half, green = across.half, blue = across.half;
      let from = (y * width + first) * 4;
      for (const weight of weights) {
        red += weight * data[from];
        green += weight * data[from + 1];
        blue += weight * data[from + 2];
        from += 4;
      }
      const to = (y * side + x) * 3;
      middle[to] = red >> across.bits;
      middle[to + 1] = green >> across.bits;
      middle[to + 2] = blue >> across.bits;
    }
  }
  const out = new Uint8ClampedArray(3 * side * side); // (3, side, side)
  const plane = side * side;
  for (let y = 0; y < side; y++) {
    const {first, weights} = down.rows[y];
    for (let x = 0; x < side; x++) {
      let red = down.half, green = down.half, blue = down.half;
      let from = (first * side + x) * 3;
      for (const weight of weights) {
        red += weight * middle[from];
        green += weight * middle[from + 1];
        blue += weight * middle[from + 2];
        from += side * 3;
      }
      const to = y * side + x;
      out[to] = red >> down.bits;
      out[plane + to] = green >> down.bits;
      out[2 * plane + to] = blue >> down.bits;
    }
  }
  return new Uint8Array(out.buffer);
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
export async function beamSearch(captioner, photo, given = {}) {
  const decoding = {...captioner.decoding, ...given};
  const width = decoding.method === 'greedy' ? 1 : decoding.beam_width;
  const {names, state} = await start(captioner, photo);
  let beams = [{ids: [], score: 0, attention: []}];
  let ended = [];
  let caption = state.caption;
  for (let length = 1; length <= decoding.max_length; length++) {
    const words = BigInt64Array.from(beams, beam => BigInt(beam.ids.at(-1) ?? START));
    const feeds = {words: new ort.Tensor('int64', words, [beams.length]), ...caption, ...state.photo};
    const found = await captioner.step.run(feeds);
    const {ending, going} = extend(beams, found, width, decoding, length);

    const normal = length ** decoding.length_preference;
    ended = best([...ended, ...ending.map(beam => ({...beam, score: beam.score / normal}))], width);
    const unfinished = going.map(beam => ({...beam, score: beam.score / normal}));
    const worst = ended.length === width ? ended.at(-1).score : -Infinity;
    const done = worst >= (unfinished[0]?.score ?? -Infinity);
    if (done || length === decoding.max_length) return ended.length ? ended : unfinished;

    const parents = going.map(beam => beam.parent);
    caption = {};
    for (const name of names) caption[name] = takeRows(found[`next_${name}`], parents);
    beams = going;
  }
}

// Encode a photo to the state before the first word.
async function start(captioner, photo) {
  const {caption: names, photo: photoNames, empty} = captioner.state;
  const size = [1, 3, captioner.side, captioner.side];
  const found = await captioner.encoder.run({photo: new ort.Tensor('uint8', photo, size)});
  const state = {caption: {}, photo: {}};
  for (const name of photoNames) state.photo[name] = found[name];
  for (const name of names) {
    state.caption[name] = found[name]
      ?? new ort.Tensor('float32', new Float32Array(0), empty[name]);
  }
  return {names, state};
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

// Write words as a sentence, as the module's `detokenize` does: export.py asked it how words join.
export function sentence(words, joins) {
  let text = '';
  words.forEach((word, i) => {
    const before = words[i - 1];
    const apart = joins.except[`${before} ${word}`]
      ?? !(joins.left.includes(word) || joins.right.includes(before));
    text += (text && apart ? ' ' : '') + (joins.shown[word] ?? word);
  });
  if (joins.stop.includes(words.at(-1))) text += ' ';
  return text.slice(0, 1).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? '' : '.');
}

// Caption one photo: its caption, the others with their scores, the attention of each word, the time.
export async function caption(captioner, blob, decoding = {}) {
  const began = performance.now();
  const found = await beamSearch(captioner, await pixels(blob, captioner.side), decoding);
  const words = found.map(({ids}) => ids.filter(id => id >= FIRST_WORD).map(id => captioner.words[id]));
  const alternatives = found.map(({score}, i) => ({text: sentence(words[i], captioner.joins), score}));
  return {
    ...alternatives[0],
    words: words[0],
    alternatives,
    attention: found[0].attention.slice(0, words[0].length),
    seconds: (performance.now() - began) / 1000,
  };
}
