// What simplenet_lib does around the network: resize a picture, weigh the heads, make the map.

// Python rounds halves to the even neighbour.
const round = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

// config._rectangle: height and width of about side² pixels.
export function rectangle(side, ratio) {
  if (ratio === 0 || ratio === 1) return [side, side];
  const root = Math.sqrt(ratio);
  return [side * root, side / root].map((length) => Math.max(32, 16 * round(length / 16)));
}

// For each output pixel of one pass: where its input begins, and whole-number weights. As torch
// has them: a triangle as wide as the reduction, and as many bits as 16 hold.
function triangle(from, to) {
  const scale = from / to, support = Math.max(scale, 1), places = [];
  let highest = 0;
  for (let i = 0; i < to; i++) {
    const centre = scale * (i + 0.5);
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const weights = [];
    for (let x = start; x < end; x++) {
      weights.push(Math.max(0, 1 - Math.abs((x - centre + 0.5) / support)));
    }
    const sum = weights.reduce((a, b) => a + b, 0);
    places.push({ start, weights: weights.map((w) => w / sum) });
    highest = Math.max(highest, ...places[i].weights);
  }
  let bits = 0;
  while (bits < 22 && Math.trunc(0.5 + highest * 2 ** (bits + 1)) < 2 ** 15) bits++;
  for (const place of places) {
    place.weights = Int32Array.from(place.weights, (w) => Math.trunc(w * 2 ** bits + 0.5));
  }
  return { places, bits };
}

// One pass of antialiased resizing, along the axis whose neighbours lie `stride` values apart.
function pass(values, from, to, stride, outer) {
  if (from === to) return values;
  const { places, bits } = triangle(from, to), half = 2 ** (bits - 1);
  const result = new Uint8ClampedArray(outer * to * stride);
  for (let o = 0; o < outer; o++) {
    for (let i = 0; i < to; i++) {
      const { start, weights } = places[i];
      for (let s = 0; s < stride; s++) {
        let at = (o * from + start) * stride + s, sum = half;
        for (let k = 0; k < weights.length; k++, at += stride) sum += weights[k] * values[at];
        result[(o * to + i) * stride + s] = sum >> bits;
      }
    }
  }
  return result;
}

// dataset.fitted: height and width that a photo takes of the rectangle it stands in.
function fitted(height, width, [h, w]) {
  const wider = (width * h) / (height * w);
  if (1 / 1.1 <= wider && wider <= 1.1) return [h, w];
  return wider > 1 ? [Math.max(1, round(h / wider)), w] : [h, Math.max(1, round(w * wider))];
}

// Height and width of a photo resized and of what the network sees, which begins at `from` in it.
function view({ width, height }, config) {
  const whole = rectangle(config.resize, config.ratio), seen = rectangle(config.crop, config.ratio);
  const taken = fitted(height, width, whole);
  const from = whole.map((side, i) =>
    round((side - seen[i]) / 2) - Math.floor((side - taken[i]) / 2));
  return { taken, seen, from };
}

// dataset.seen_box in shares of the photo: left, top, width, height.
function seenBox(photo, config) {
  const { taken: [h, w], seen, from } = view(photo, config);
  const [top, left] = from.map((at) => Math.max(at, 0));
  const bottom = Math.min(from[0] + seen[0], h), right = Math.min(from[1] + seen[1], w);
  return [left / w, top / h, (right - left) / w, (bottom - top) / h];
}

// The part of a map that shows the photo itself, and no mirror image of it: dataset.own_part.
export function ownPart(map, photo, config) {
  const { taken, seen, from } = view(photo, config);
  const [top, left] = from.map((at) => Math.max(0, -at));
  const [bottom, right] = from.map((at, i) => Math.min(seen[i], taken[i] - at));
  const height = bottom - top, width = right - left, own = new Float32Array(height * width);
  for (let y = 0; y < height; y++) {
    const at = (top + y) * seen[1] + left;
    own.set(map.subarray(at, at + width), y * width);
  }
  return { map: own, height, width };
}

// RGBA pixels as the network sees them: resized as torchvision does, between their mirror images
// where their shape is another, the centre cut out, RGB.
export function asSeen({ data, width, height }, config) {
  const { taken: [h, w], seen: [seenH, seenW], from: [top, left] } = view({ width, height }, config);
  const rgb = new Uint8ClampedArray(width * height * 3);
  for (let i = 0, j = 0; i < data.length; i += 4) {
    rgb[j++] = data[i]; rgb[j++] = data[i + 1]; rgb[j++] = data[i + 2];
  }
  const small = pass(pass(rgb, width, w, 3, height), height, h, w * 3, 1);
  const mirrored = (at, side) => {
    const turn = 2 * side, place = ((at % turn) + turn) % turn;
    return Math.min(place, turn - 1 - place);
  };
  const pixels = new Uint8Array(seenH * seenW * 3);
  for (let y = 0, to = 0; y < seenH; y++) {
    const row = mirrored(y + top, h) * w;
    for (let x = 0; x < seenW; x++, to += 3) {
      const at = (row + mirrored(x + left, w)) * 3;
      for (let c = 0; c < 3; c++) pixels[to + c] = small[at + c];
    }
  }
  return { pixels, height: seenH, width: seenW };
}

// model.before_activation and the standardisation, of all heads: what the graphs take.
export function fuse(tensors, config) {
  const { heads, adaptor_channels: A, hidden_channels: H } = config;
  const mean = tensors["standardise.mean"].data, std = tensors["standardise.std"].data;
  const C = mean.length;
  const weight = new Float32Array(heads * H * C), bias = new Float32Array(heads * H);
  const score = new Float32Array(heads * H);
  for (let k = 0; k < heads; k++) {
    const of = (name) => tensors[`heads.${k}.${name}`]?.data;
    const W = of("adaptor.linear.weight"), b = of("adaptor.linear.bias");
    const V = of("discriminator.hidden.weight"), c = of("discriminator.hidden.bias");
    const gain = of("discriminator.norm.weight"), shift = of("discriminator.norm.bias");
    const centre = of("discriminator.norm.running_mean");
    const variance = of("discriminator.norm.running_var");
    const row = new Float64Array(C);
    for (let j = 0; j < H; j++) {
      row.fill(0);
      let constant = c[j];
      for (let a = 0; a < A; a++) {
        const v = V[j * A + a];
        constant += v * b[a];
        for (let i = 0; i < C; i++) row[i] += v * W[a * C + i];
      }
      if (gain) {
        const scale = gain[j] / Math.sqrt(variance[j] + 1e-5);
        constant = (constant - centre[j]) * scale + shift[j];
        for (let i = 0; i < C; i++) row[i] *= scale;
      }
      for (let i = 0; i < C; i++) {
        const value = row[i] / std[i];
        weight[(k * H + j) * C + i] = value;
        constant -= value * mean[i];
      }
      bias[k * H + j] = constant;
    }
    score.set(of("discriminator.score.weight"), k * H);
  }
  return { weight, bias, score, rows: heads * H, channels: C, heads, hidden: H };
}

// SimpleNet.committee without level and scale: the mean of some heads' maps, each in its units.
export function meanOf(maps, heads, centre, spread) {
  const result = new Float32Array(maps[0].length);
  maps.forEach((map, i) => {
    const c = centre[heads[i]], s = spread[heads[i]] * maps.length;
    for (let p = 0; p < map.length; p++) result[p] += (map[p] - c) / s;
  });
  return result;
}

// localization.anomaly_map: (h, w) to (height, width), then a Gaussian that sees 0 outside.
export function anomalyMap(scores, [h, w], [height, width], smoothing) {
  const place = (i, from, to) => {
    const at = Math.max(0, ((i + 0.5) * from) / to - 0.5), low = Math.floor(at);
    return [low, Math.min(low + 1, from - 1), at - low];
  };
  let map = new Float32Array(height * width);
  const columns = Array.from({ length: width }, (_, x) => place(x, w, width));
  for (let y = 0; y < height; y++) {
    const [top, bottom, down] = place(y, h, height);
    for (let x = 0; x < width; x++) {
      const [left, right, across] = columns[x];
      const mix = (row) => scores[row * w + left] * (1 - across) + scores[row * w + right] * across;
      map[y * width + x] = mix(top) * (1 - down) + mix(bottom) * down;
    }
  }
  if (!smoothing) return map;
  const radius = Math.ceil(3 * smoothing);
  const kernel = Float64Array.from({ length: 2 * radius + 1 }, (_, i) =>
    Math.exp(-0.5 * ((i - radius) / smoothing) ** 2));
  const sum = kernel.reduce((a, b) => a + b, 0);
  for (const [step, length] of [[1, width], [width, height]]) {
    const blurred = new Float32Array(map.length);
    for (let p = 0; p < map.length; p++) {
      const at = Math.floor(p / step) % length;
      const from = Math.max(-radius, -at), to = Math.min(radius, length - 1 - at);
      let value = 0;
      for (let k = from; k <= to; k++) value += kernel[k + radius] * map[p + k * step];
      blurred[p] = value / sum;
    }
    map = blurred;
  }
  return map;
}

export const highest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

export const bounded = (value, bound) => (bound ? bound * Math.tanh(value / bound) : value);

// localization.judge, from all heads' score maps on, and where in the photo its map lies.
export function judge(maps, model, photo) {
  const { config, centre, spread, level, scale, typical, threshold, grid } = model;
  const scores = meanOf(maps, maps.map((_, k) => k), centre, spread);
  for (let p = 0; p < scores.length; p++) {
    scores[p] = bounded((scores[p] - level[p]) / scale[p], config.bound);
  }
  const seen = rectangle(config.crop, config.ratio);
  const own = ownPart(anomalyMap(scores, grid, seen, config.smoothing), photo, config);
  own.map = own.map.map((value) => (value - typical) / (threshold - typical));
  return { ...own, score: highest(own.map), box: seenBox(photo, config) };
}
