// Keeps the page for when there is no network: from the network if it answers, else as last seen.
// The large files, which never change under their address, captioner.js keeps by itself.
const CACHE = 'storyteller-page';
const PAGE = [
  './', 'style.css', 'page.js', 'worker.js', 'captioner.js', 'model/captioner.json',
  'runtime/ort.wasm.min.mjs', 'runtime/ort-wasm-simd-threaded.mjs',
];

self.addEventListener('install', event => {
  self.skipWaiting();
  event.waitUntil(caches.open(CACHE).then(cache => cache.addAll(PAGE)));
});

self.addEventListener('activate', event => event.waitUntil(self.clients.claim()));

self.addEventListener('fetch', event => {
  const {request} = event;
  const url = new URL(request.url);
  const small = !url.search || request.mode === 'navigate';
  const ours = request.method === 'GET' && url.origin === location.origin && small;
  if (ours) event.respondWith(fromNetworkElseCache(request));
});

async function fromNetworkElseCache(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const stored = await cache.match(request, {ignoreSearch: true});
    if (stored) return stored;
    throw error;
  }
}
