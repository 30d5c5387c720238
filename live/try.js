// The page "Try it": the nut to scratch. The detector lives in worker.js, own photos in own.js.
const HERE = new URL(".", import.meta.url);
export const $ = (id) => document.getElementById(id);
export const say = (id, text) => { $(id).textContent = text; };
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(0)} MB`;

/* ---------- the worker ---------- */
let worker, loading, number = 0;
const waiting = new Map();

export function ask(kind, message = {}, progress = () => {}) {
  worker ??= start();
  const id = ++number;
  const answer = new Promise((resolve, reject) => waiting.set(id, { resolve, reject, progress }));
  worker.postMessage({ id, kind, ...message });
  return Object.assign(answer, { cancel: () => worker.postMessage({ kind: "cancel", of: id }) });
}

function start() {
  const made = new Worker(new URL("worker.js", HERE), { type: "module" });
  made.onmessage = ({ data: { id, progress, result, fault } }) => {
    const one = waiting.get(id);
    if (progress) return one.progress(progress);
    waiting.delete(id);
    if (fault) one.reject(new Error(fault));
    else one.resolve(result);
  };
  made.onerror = (event) => {
    event.preventDefault();
    stop("The detector cannot start in this browser: take a newer Firefox, Chrome, Edge or Safari.");
  };
  return made;
}

export function stop(reason) {
  worker?.terminate();
  worker = loading = undefined;
  nut.ready = $("nut-load").hidden = false;
  for (const { reject } of waiting.values()) reject(new Error(reason));
  waiting.clear();
}

// The detector is loaded once, by whichever button comes first.
export function loaded(bar, status) {
  $(bar).hidden = false;
  loading ??= ask("load", {}, ({ done, total }) => {
    for (const id of ["nut-bar", "own-bar"]) Object.assign($(id), { max: total, value: done });
    say(status, done < total ? `Loading: ${megabytes(done)} of ${megabytes(total)}` : "Starting …");
  }).then(
    () => { keep(); },
    (error) => {
      loading = undefined;
      throw error;
    },
  );
  return loading.finally(() => { $(bar).hidden = true; });
}

// What was loaded is kept, so that the page works without a network.
async function keep() {
  const store = await self.caches?.open("simplenet-try").catch(() => undefined);
  const parts = performance.getEntriesByType("resource").map(({ name }) => name);
  const names = loading ? info.scripts.map((name) => new URL(name, HERE).href) : [];
  const own = [...parts, ...names].filter((name) => name.startsWith(location.origin));
  for (const name of new Set([location.href.split("#")[0], ...own])) {
    if (!/\.(onnx|wasm|safetensors)(\?|$)/.test(name)) { // these the worker keeps
      await store?.add(new Request(name, { cache: "force-cache" })).catch(() => {});
    }
  }
}

/* ---------- map and verdict ---------- */
// matplotlib's inferno in nine steps.
const INFERNO = ["000004", "1b0c41", "4a0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9b06", "fcffa4"]
  .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

// As plots.overlay: invisible at 0, opaque at 2, a line at the threshold.
export function paint(canvas, { map, width, height }) {
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let p = 0; p < map.length; p++) {
    const share = Math.min(Math.max(map[p] / 2, 0), 1), at = Math.min(share * 8, 7.999);
    const low = INFERNO[Math.floor(at)], high = INFERNO[Math.floor(at) + 1];
    const line = map[p] > 1 && [p - 1, p + 1, p - width, p + width].some((q) => !(map[q] > 1));
    for (let c = 0; c < 3; c++) {
      image.data[4 * p + c] = line ? 255 : low[c] + (high[c] - low[c]) * (at % 1);
    }
    image.data[4 * p + 3] = line ? 255 : 200 * share;
  }
  context.putImageData(image, 0, 0);
}

export const verdict = (score) =>
  `${score > 1 ? "anomalous" : "normal"}, score ${score.toFixed(2)} (threshold 1)`;

/* ---------- a nut to scratch ---------- */
const nut = { strokes: [], tip: [128, 128], down: false, index: 0, ready: false, busy: false };

function drawNut() {
  const context = $("nut-photo").getContext("2d", { willReadFrequently: true });
  if (nut.image) context.drawImage(nut.image, 0, 0, 256, 256);
  context.lineCap = context.lineJoin = "round";
  for (const [width, colour, shift] of [[2, "#3d3b39", 0], [0.7, "#d8d5cf", 1.2]]) {
    Object.assign(context, { lineWidth: width, strokeStyle: colour });
    for (const stroke of nut.strokes) {
      context.beginPath();
      context.moveTo(stroke[0][0] + shift, stroke[0][1] + shift + 0.1); // a click leaves a dot
      for (const [x, y] of stroke) context.lineTo(x + shift, y + shift);
      context.stroke();
    }
  }
  const tip = $("nut-tip");
  tip.style.left = `${nut.tip[0] / 2.56}%`;
  tip.style.top = `${nut.tip[1] / 2.56}%`;
  tip.classList.toggle("down", nut.down);
}

async function scoreNut() {
  nut.stale = true;
  if (!nut.ready || nut.busy) return;
  nut.busy = true;
  try {
    while (nut.stale) { // the newest state only
      nut.stale = false;
      const context = $("nut-photo").getContext("2d", { willReadFrequently: true });
      const { data, width, height } = context.getImageData(0, 0, 256, 256);
      const result = await ask("predict", { model: "nut", photo: { data, width, height } });
      paint($("nut-map"), result);
      $("nut-photo").dataset.score = result.score;
      $("nut-level").style.width = `${Math.min(Math.max(result.score / 2, 0), 1) * 100}%`;
      $("nut-level").classList.toggle("anomalous", result.score > 1);
      say("nut-status", `This nut: ${verdict(result.score)}.`);
    }
  } catch (error) {
    say("nut-status", error.message);
  }
  nut.busy = false;
}

async function showNut(index) {
  nut.index = index;
  const image = new Image();
  image.src = new URL(nut.ready ? info.nuts[index] : info.answers[0].photo, HERE);
  await image.decode();
  nut.image = image;
  drawNut();
  return scoreNut();
}

function scratchable(canvas) {
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top].map((v) => (v * 256) / box.width);
  };
  const move = (to) => {
    nut.tip = to.map((v) => Math.min(Math.max(v, 0), 256));
    if (nut.down) nut.strokes.at(-1).push(nut.tip);
    drawNut();
    if (nut.down) scoreNut();
  };
  const press = (down) => {
    nut.down = down;
    if (down) nut.strokes.push([nut.tip]);
    drawNut();
    if (down) scoreNut();
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    nut.down = false;
    move(at(event));
    press(true);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (canvas.hasPointerCapture(event.pointerId)) move(at(event));
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => press(false));
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    const arrow = arrows[event.key], step = event.shiftKey ? 16 : 4;
    if (arrow) move(nut.tip.map((v, i) => v + step * arrow[i]));
    else if (event.key === " ") press(!nut.down);
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("blur", () => { if (nut.down) press(false); });
}

/* ---------- start ---------- */
const info = await (await fetch(new URL("info.json", HERE))).json();

for (const { kind, photo, map, score } of info.answers) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  for (const [src, alt] of [[photo, `A nut, ${kind}`], [map, `Its anomaly map, ${verdict(score)}`]]) {
    figure.append(Object.assign(new Image(160, 160), { src: new URL(src, HERE), alt }));
  }
  caption.textContent = `${kind}: ${score.toFixed(2)}, ${score > 1 ? "anomalous" : "normal"}`;
  figure.append(caption);
  $("nut-answers").append(figure);
}

const size = megabytes(info.bytes);
say("nut-load", `Load the detector (${size})`);
if (navigator.deviceMemory < 4) {
  $("try-memory").hidden = false;
  say("try-memory", `This device says it has ${navigator.deviceMemory} GB of memory. The detector needs about half of one; the page may be closed by the system. A computer is safer, or fewer photos.`);
}

scratchable($("nut-photo"));
await showNut(0);
$("nut-load").addEventListener("click", async () => {
  $("nut-load").disabled = true;
  $("nut-cancel").hidden = false;
  try {
    await loaded("nut-bar", "nut-status");
    nut.ready = true;
    $("nut-load").hidden = true;
    await showNut(0);
  } catch (error) {
    say("nut-status", error.message);
  }
  $("nut-load").disabled = false;
  $("nut-cancel").hidden = true;
});
$("nut-cancel").addEventListener("click", () => stop("Cancelled. Nothing is kept of an unfinished file."));
$("nut-clean").addEventListener("click", () => { nut.strokes = []; nut.down = false; drawNut(); scoreNut(); });
$("nut-next").addEventListener("click", () => {
  nut.strokes = [];
  showNut(nut.ready ? (nut.index + 1) % info.nuts.length : 0);
});

// The second half of the page comes when it is first touched.
for (const event of ["pointerover", "focusin", "dragenter", "change"]) {
  $("own").addEventListener(event, () => import("./own.js"), { once: true });
}

document.documentElement.dataset.try = "ready";
navigator.serviceWorker?.register(new URL("../../try-sw.js", HERE)).catch(() => {});
keep();
