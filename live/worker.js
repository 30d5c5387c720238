// The detector in a thread of its own, so that the page stays awake. Messages in:
// { id, kind, … }; out: { id, progress } any number of times, then { id, result } or { id, fault }.
import * as ort from "./ort.wasm.bundle.min.mjs";
import { Fault, asModel, read, write } from "./checkpoint.js";
import { asSeen, fuse, judge, rectangle } from "./detector.js";
import { calibrate, drawer, firstState, headTensors, median, random, splitImages, standardisation }
  from "./training.js";

ort.env.wasm.numThreads = 1; // more need headers that a plain static host does not send
ort.env.logLevel = "error";

const STORE = "simplenet-try";
const models = {}, sessions = {};
let page; // page.json: the files, the configuration, the layout of a head's state

const tensor = (values, shape, type = "float32") => new ort.Tensor(type, values, shape);
const breathe = () => new Promise((resolve) => setTimeout(resolve)); // messages come in: Cancel

// A file of the page: from the store, or fetched, compared with its checksum, and stored.
async function file(name, advance) {
  const { bytes, sha256 } = page.files[name];
  const address = new URL(`${name}?${sha256.slice(0, 12)}`, self.location).href;
  const store = self.caches && (await caches.open(STORE));
  const kept = await store?.match(address);
  if (kept) {
    advance(bytes);
    return new Uint8Array(await kept.arrayBuffer());
  }
  let response;
  try {
    response = await fetch(address);
  } catch {
    throw new Fault(`${name} cannot be loaded: there is no network, and this browser has not kept it.`);
  }
  if (!response.ok) throw new Fault(`${name} cannot be loaded: the server says ${response.status}.`);
  const data = new Uint8Array(bytes), reader = response.body.getReader();
  let at = 0;
  for (let part; !(part = await reader.read()).done; at += part.value.length) {
    if (at + part.value.length > bytes) break;
    data.set(part.value, at);
    advance(part.value.length);
  }
  if (self.crypto.subtle) { // absent on a host without https
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (hex !== sha256) {
      throw new Fault(`${name} has arrived damaged (another checksum): load the page again.`);
    }
  }
  try {
    for (const old of (await store?.keys()) ?? []) {
      if (new URL(old.url).pathname === new URL(address).pathname) await store.delete(old);
    }
    await store?.put(address, new Response(data));
  } catch {} // a full disk: the next visit loads it again
  return data;
}

async function load(_, report) {
  page = await (await fetch("page.json")).json();
  const names = page.load, total = names.reduce((sum, name) => sum + page.files[name].bytes, 0);
  let done = 0;
  const advance = (bytes) => report({ done: (done += bytes), total });
  for (const name of names) {
    const data = await file(name, advance);
    if (name.endsWith(".wasm")) ort.env.wasm.wasmBinary = data.buffer;
    else if (name.endsWith(".onnx")) {
      sessions[name] = await ort.InferenceSession.create(data, { executionProviders: ["wasm"] });
    } else models.nut = asModel(read(data), page);
  }
  return { config: models.nut.config };
}

// The pixels of a photo, upright, as they are in the file, what is transparent laid on white.
async function decode(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, {
      imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none",
    });
  } catch {
    throw new Fault(`${blob.name ?? "The photo"} cannot be decoded: it is damaged, or too large for this device.`);
  }
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

const outputs = async (image, config) => {
  const { pixels, height, width } = asSeen(image, config);
  return sessions["backbone.onnx"].run({ pixels: tensor(pixels, [height, width, 3], "uint8") });
};

const heads = ({ weight, bias, score, rows, channels, heads: count, hidden }) => ({
  weight: tensor(weight, [rows, channels]),
  bias: tensor(bias, [rows]),
  score: tensor(score, [count, hidden]),
});

const split = (values, count) => Array.from({ length: count }, (_, k) =>
  values.subarray((k * values.length) / count, ((k + 1) * values.length) / count));

async function predict({ model: name, photo }) {
  const model = models[name];
  if (!model) throw new Fault("The detector is no longer there: train it or open it again.");
  const image = photo instanceof Blob ? await decode(photo) : photo;
  const layers = await outputs(image, model.config);
  const { maps } = await sessions["maps.onnx"].run({ ...layers, ...heads(model.fused) });
  return judge(split(maps.data, model.config.heads), model, image);
}

async function train({ photos, ratios, seed = 0 }, report, cancelled) {
  const ratio = Math.round(1000 * median(ratios)) / 1000; // as benchmark.datasets
  const config = { ...page.config, ratio, seed };
  const seen = rectangle(config.crop, ratio), grid = seen.map((side) => side / page.stride);
  const places = grid[0] * grid[1], C = page.channels, K = config.heads, B = config.batch_size;
  const started = performance.now(), seconds = {};

  const features = [], sizes = [], sum = new Float64Array(C), squares = new Float64Array(C);
  for (const [i, photo] of photos.entries()) {
    report({ stage: "features", done: i, total: photos.length });
    await breathe();
    if (cancelled()) return null;
    const image = await decode(photo), layers = await outputs(image, config);
    sizes.push({ width: image.width, height: image.height });
    const joined = await sessions["join.onnx"].run(layers);
    features.push(joined.vectors.data);
    for (let c = 0; c < C; c++) {
      sum[c] += joined.sum.data[c];
      squares[c] += joined.squares.data[c];
    }
  }
  seconds.features = (performance.now() - started) / 1000;

  const chance = random(seed);
  const folds = splitImages(photos.length, K, chance);
  const { mean, std } = standardisation(sum, squares, photos.length * places);
  const channel = { channel_mean: tensor(mean, [C]), channel_std: tensor(std, [C]) };
  const weights = new Float32Array(photos.length * places);
  for (const [i, vectors] of features.entries()) {
    const inputs = { vectors: tensor(vectors, [places, C], "float16"), ...channel };
    const { norms } = await sessions["norms.onnx"].run(inputs);
    weights.set(norms.data.map((norm) => Math.max(norm ** config.emphasis, 1e-6)), i * places);
  }
  const draw = drawer(weights, chance);
  const states = Array.from({ length: K }, () => firstState(page.layout, chance));
  const Half = features[0].constructor, batch = new Half(B * C);
  for (let step = 0; step < config.steps; step++) {
    let loss = 0;
    for (let k = 0; k < K; k++) {
      for (let row = 0; row < B;) {
        const at = draw(), photo = Math.floor(at / places), start = (at % places) * C;
        if (folds[photo] === k) continue;
        batch.set(features[photo].subarray(start, start + C), row++ * C);
      }
      const after = await sessions["step.onnx"].run({
        vectors: tensor(batch, [B, C], "float16"),
        noise: tensor(chance.normals(B * config.adaptor_channels), [B, config.adaptor_channels]),
        step: tensor(Float32Array.of(step), []),
        state: tensor(states[k], [4, states[k].length / 4]),
        ...channel,
      });
      states[k] = after.next.data;
      loss += after.loss.data[0] / K;
    }
    report({ stage: "steps", done: step + 1, total: config.steps, loss });
    await breathe();
    if (cancelled()) return null;
  }
  seconds.steps = (performance.now() - started) / 1000 - seconds.features;

  const tensors = { "standardise.mean": { data: mean }, "standardise.std": { data: std } };
  states.forEach((state, k) => {
    const found = headTensors(page.layout, state, config.averaging);
    for (const [name, data] of Object.entries(found)) tensors[`heads.${k}.${name}`] = { data };
  });
  const fused = fuse(tensors, config), maps = [];
  for (const [i, vectors] of features.entries()) {
    report({ stage: "threshold", done: i, total: features.length });
    await breathe();
    if (cancelled()) return null;
    const { scores } = await sessions["scores.onnx"].run({
      vectors: tensor(vectors, [places, C], "float16"), ...heads(fused),
    });
    maps.push(split(scores.data, K));
  }
  const units = calibrate(maps, folds, config, grid, sizes);
  for (const name of ["centre", "spread", "level", "scale"]) tensors[name] = { data: units[name] };
  seconds.all = (performance.now() - started) / 1000;

  // What this page does not compute, whether a photo is unfamiliar as a whole, never speaks.
  const whole = {};
  for (const [name, { dtype, shape, values }] of Object.entries(page.tensors)) {
    const own = ["level", "scale"].includes(name) ? grid : shape;
    const length = own.reduce((a, b) => a * b, 1);
    const filled = () => dtype === "I64"
      ? BigInt64Array.from({ length }, () => BigInt(config.steps))
      : Float32Array.from({ length }, (_, i) => values[i % values.length]);
    whole[name] = { dtype, shape: own, data: tensors[name]?.data ?? filled() };
  }
  const checkpoint = write(whole, {
    format: page.format, weights: page.weights, config: JSON.stringify(config),
    typical: String(units.typical), threshold: String(units.threshold),
  });
  models.own = asModel(read(checkpoint), page); // what is used is what is downloaded
  return { checkpoint, scores: units.scores, seconds, config };
}

async function open({ bytes }) {
  models.own = asModel(read(bytes), page);
  return { config: models.own.config };
}

const kinds = { load, predict, train, open };
const stopped = new Set();
let queue = Promise.resolve();

self.onmessage = ({ data: { id, kind, ...rest } }) => {
  if (kind === "cancel") stopped.add(rest.of);
  else queue = queue.then(async () => {
    try {
      const report = (progress) => self.postMessage({ id, progress });
      const result = await kinds[kind](rest, report, () => stopped.has(id));
      self.postMessage({ id, result });
    } catch (error) {
      const memory = error instanceof RangeError || /memory|alloc/i.test(error.message);
      const fault = error instanceof Fault ? error.message
        : memory ? "This device has too little free memory for that: close other pages, or take fewer photos."
        : `Something went wrong that should not have: ${error.message}`;
      self.postMessage({ id, fault });
    }
  });
};
