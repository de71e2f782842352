// The page: takes photos in, has the worker caption them, and shows what it says.
const $ = id => document.getElementById(id);
const worker = new Worker(new URL('worker.js', import.meta.url), {type: 'module'});
const waiting = new Map(); // id of a message -> how its promise ends
const photos = []; // of the table: {name, blob, url, result, problem, row}
let shown; // the photo on the stage
let captioner; // what the worker says of it
// Of the examples, what its photos show; app.py too.
const LEARNED = new Set(['bicycle.jpg', 'dog.jpg', 'egret.jpg', 'photographer.jpg', 'runner.jpg']);
const UNSURE = 0.3; // confidence below which a caption is a guess; app.py has it too

// The worker -----------------------------------------------------------------------------------------

let lastId = 0;

function ask(message, progress) {
  const id = ++lastId;
  return new Promise((resolve, reject) => {
    waiting.set(id, {resolve, reject, progress});
    worker.postMessage({id, ...message});
  });
}

worker.onmessage = ({data: {id, progress, result, error}}) => {
  const {resolve, reject, progress: report} = waiting.get(id);
  if (progress !== undefined) return report(progress);
  waiting.delete(id);
  return error === undefined ? resolve(result) : reject(new Error(error));
};
worker.onerror = event => fail(event.message || 'The worker did not start.');

async function load() {
  say('The caption will appear here.', 'waiting');
  const base = new URL('model/', location.href).href;
  captioner = await ask({base}, share => { $('progress').value = share; });
  $('loading').hidden = true;
  describe(captioner);
}

function fail(message) {
  $('loading').hidden = true;
  say(`The captioner could not be loaded: ${message}. Reload the page to try again; it needs a browser from 2024 or later.`, 'problem');
}

function describe({dataset, decoding, facts, language, precision, examples}) {
  for (const id of ['caption', 'words', 'others']) $(id).lang = language; // of the captions, for screen readers
  $('trained').textContent = dataset.sample
    ? 'Trained on drawings only: it will be wrong about photos.'
    : `Trained on ${dataset.photos.toLocaleString('en')} photos of ${dataset.name}.`;
  $('width').value = decoding.beam_width;
  $('length').value = decoding.length_preference;
  showValues();
  $('facts').textContent = `Decoder ${facts.decoder} on ${facts.backbone}, `
    + `${facts.vocabulary.toLocaleString('en')} words`
    + (precision === 'int8' ? ', its weights in 8 bits: some captions differ.' : '.');
  if (facts.scores) $('scores').append(`Scores on ${facts.scored_on}:`, scoreTable(facts.scores));
  const learned = examples.filter(name => LEARNED.has(name));
  const others = examples.filter(name => !LEARNED.has(name));
  showExamples('What it has learned: people, dogs, sport, water', learned);
  showExamples('What it has not: it guesses', others);
  $('examples').hidden = !examples.length;
}

function scoreTable(scores) {
  const table = element('table', {}, element('thead', {}, headRow('Metric', 'Score', '95 % interval')));
  const body = element('tbody');
  for (const [name, {value, low, high}] of Object.entries(scores)) {
    body.append(bodyRow(name, value.toFixed(3), `${low.toFixed(3)} to ${high.toFixed(3)}`));
  }
  table.append(body);
  return table;
}

function showExamples(label, names) {
  const row = element('div', {className: 'row'}, ...names.map(exampleButton));
  const group = element('div', {role: 'group', ariaLabel: label}, element('p', {className: 'quiet'}, label), row);
  if (names.length) $('examples').append(group);
}

function exampleButton(name) {
  const url = `examples/${name}`;
  const image = element('img', {src: url, alt: `Example: ${name.replace(/\.\w+$/, '').replaceAll('_', ' ')}`});
  const button = element('button', {type: 'button'}, image);
  button.onclick = async () => {
    const blob = await (await fetch(url)).blob();
    take([new File([blob], name, {type: blob.type})]);
  };
  return button;
}

// Photos in ------------------------------------------------------------------------------------------

async function take(files) {
  if (!files.length) return;
  if (files.length > 1) return takeSeveral(files);
  return show(asPhoto(files[0]));
}

function asPhoto(file) {
  return {name: file.name || 'photo', blob: file, url: URL.createObjectURL(file)};
}

async function takeSeveral(files) {
  const added = [...files].map(asPhoto);
  photos.push(...added);
  $('several').hidden = false;
  for (const photo of added) {
    photo.row = tableRow(photo);
    $('several').querySelector('tbody').append(photo.row);
  }
  await show(added[0]);
  for (const photo of added.slice(1)) await caption(photo);
}

$('files').onchange = $('camera').onchange = ({target}) => {
  take([...target.files]);
  target.value = ''; // or the same photo could not be chosen again
};

addEventListener('paste', ({clipboardData}) => take(images(clipboardData.files)));
addEventListener('dragover', event => {
  event.preventDefault();
  $('stage').classList.add('over');
});
addEventListener('dragleave', () => $('stage').classList.remove('over'));
addEventListener('drop', event => {
  event.preventDefault();
  $('stage').classList.remove('over');
  take([...event.dataTransfer.files]);
});

const images = files => [...files].filter(({type}) => type.startsWith('image/'));

// Captions -------------------------------------------------------------------------------------------

function decoding() {
  if (!captioner) return {}; // chosen before it was loaded: its own defaults, which are not shown yet
  return {
    method: $('method').value,
    beam_width: Number($('width').value),
    length_preference: Number($('length').value),
  };
}

async function caption(photo) {
  try {
    photo.result = await ask({blob: photo.blob, decoding: decoding()});
    photo.problem = '';
  } catch (error) {
    photo.result = undefined;
    photo.problem = error.message;
  }
  if (photo.row) fillRow(photo);
  if (photo === shown) showResult();
}

async function show(photo) {
  if (shown && !photos.includes(shown) && shown !== photo) URL.revokeObjectURL(shown.url);
  shown = photo;
  for (const {row} of photos) row?.toggleAttribute('aria-current', row === photo.row);
  $('stage').classList.remove('empty');
  $('hint').hidden = true;
  $('photo').hidden = false;
  $('photo').src = photo.url;
  $('photo').alt = photo.name;
  if (photo.result || photo.problem) return showResult();
  clearResult();
  say(captioner ? 'Captioning' : 'Waiting for the captioner', 'waiting');
  return caption(photo);
}

// A confidence in words, as a bar and as a number, as the Gradio page has it.
function howSure(confidence) {
  if (confidence === undefined) return '';
  const words = confidence < UNSURE ? 'A guess' : confidence < 0.8 ? 'Probably' : 'Sure';
  const bar = Math.round(10 * confidence);
  const said = `${words} ${'▰'.repeat(bar)}${'▱'.repeat(10 - bar)} ${confidence.toFixed(2)}`;
  return ` · ${said.replaceAll(' ', '\u00a0')}`; // a phone breaks the line before it
}

function say(text, kind = '') {
  $('caption').textContent = text;
  $('caption').className = kind;
}

function clearResult() {
  for (const id of ['veil', 'unsure', 'words', 'others']) $(id).hidden = true;
  $('note').textContent = '';
}

function showResult() {
  clearResult();
  const {result, problem} = shown;
  if (problem) {
    $('photo').hidden = true;
    $('stage').classList.add('empty');
    return say(problem, 'problem');
  }
  say(result.text);
  $('photo').alt = result.text;
  const took = `Captioned in ${result.seconds.toFixed(2)} s on this device`;
  $('note').textContent = took + howSure(result.confidence);
  const rows = result.alternatives.map(({text, score}) => bodyRow(text, score.toFixed(3)));
  $('others').querySelector('tbody').replaceChildren(...rows);
  $('others').hidden = false;
  if (result.confidence < UNSURE) showOthers(result.alternatives.slice(1));
  if (result.attention.length) showWords(result);
}

// A guess's other captions come first: one of them may be right.
function showOthers(alternatives) {
  const items = alternatives.map(({text}) => element('li', {lang: captioner.language}, text));
  $('unsure').querySelector('ul').replaceChildren(...items);
  $('unsure').hidden = !items.length;
}

// Attention ------------------------------------------------------------------------------------------

// The words as radio buttons, so that the arrow keys go through them; the pointer shows others.
function showWords({words, attention}) {
  const first = sharpest(words, attention);
  const labels = words.map((word, i) => {
    const input = element('input', {type: 'radio', name: 'word'});
    input.checked = i === first;
    input.onchange = () => drawVeil(attention[i]);
    const label = element('label', {}, input, word);
    label.onpointerenter = () => drawVeil(attention[i]);
    label.onpointerleave = () => drawVeil(attention[chosen()]);
    return label;
  });
  const chosen = () => labels.findIndex(label => label.firstChild.checked);
  $('words').replaceChildren($('words').querySelector('legend'), ...labels);
  $('words').hidden = false;
  drawVeil(attention[first]);
}

// Shown first is the sharpest attention, of a word that is long enough for a thing.
function sharpest(words, attention) {
  const rank = words.map((word, i) => Math.max(...attention[i]) + (word.length > 2 ? 1 : 0));
  return rank.indexOf(Math.max(...rank));
}

// Clear where the weights are high, dark elsewhere: as attention.py paints it.
function drawVeil(weights) {
  const side = Math.sqrt(weights.length);
  const [low, high] = [Math.min(...weights), Math.max(...weights)];
  const image = new ImageData(side, side);
  weights.forEach((weight, i) => {
    const level = (weight - low) / Math.max(high - low, 1e-9);
    const alpha = 170 * (1 - level) ** 1.2;
    image.data.set([255 * level, 170 * level, 40 * level, alpha].map(Math.round), 4 * i);
  });
  const canvas = $('veil');
  canvas.width = canvas.height = side;
  canvas.getContext('2d').putImageData(image, 0, 0);
  canvas.hidden = false;
}

// The table ------------------------------------------------------------------------------------------

function tableRow(photo) {
  const image = element('img', {src: photo.url, alt: ''});
  image.onerror = () => image.remove(); // no photo: the row says so
  const button = element('button', {type: 'button'}, image, photo.name);
  button.onclick = () => show(photo);
  return bodyRow(button, '…', '');
}

function fillRow({row, result, problem}) {
  row.cells[1].textContent = result?.text ?? problem;
  row.cells[2].textContent = result?.score.toFixed(3) ?? '';
  const done = photos.filter(photo => photo.result || photo.problem);
  $('count').textContent = `${done.length} of ${photos.length} photos captioned`;
  const lines = [['photo', 'caption', 'score', 'confidence', 'problem']];
  for (const photo of done) {
    const {text = '', score, confidence} = photo.result ?? {};
    const numbers = [score?.toFixed(3) ?? '', confidence?.toFixed(2) ?? ''];
    lines.push([photo.name, text, ...numbers, photo.problem ?? '']);
  }
  const csv = lines.map(line => line.map(quote).join(',')).join('\n') + '\n';
  if ($('csv').href) URL.revokeObjectURL($('csv').href);
  $('csv').href = URL.createObjectURL(new Blob([csv], {type: 'text/csv'}));
}

const quote = text => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

$('clear').onclick = () => {
  for (const photo of photos.splice(0)) if (photo !== shown) URL.revokeObjectURL(photo.url);
  $('several').querySelector('tbody').replaceChildren();
  $('several').hidden = true;
};

// Decoding -------------------------------------------------------------------------------------------

function showValues() {
  for (const output of document.querySelectorAll('output')) {
    output.value = $(output.htmlFor.value).value;
  }
  $('width').disabled = $('method').value === 'greedy';
}

for (const control of ['method', 'width', 'length']) {
  $(control).oninput = showValues;
  $(control).onchange = () => {
    showValues();
    if (shown) caption(shown);
  };
}

// Small parts ----------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

const row = kind => (...cells) => element('tr', {}, ...cells.map(cell => element(kind, {}, cell)));
const headRow = row('th');
const bodyRow = row('td');

// Without a network the service worker brings the page itself, and captioner.js finds its own files.
navigator.serviceWorker?.register('service-worker.js').catch(() => {}); // in a frame it may be forbidden
load().catch(error => fail(error.message));
