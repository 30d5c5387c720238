// Offline: what the page "Try it" has kept answers when the network does not.
const STORE = "simplenet-try";

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || new URL(request.url).origin !== self.location.origin) return;
  event.respondWith(
    fetch(request).catch(async (error) => {
      const kept = await (await caches.open(STORE)).match(request);
      if (kept) return kept;
      throw error;
    }),
  );
});
