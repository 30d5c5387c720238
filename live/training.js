// What simplenet_lib.training does around the steps: folds, batches, first weights, calibration.
import { anomalyMap, bounded, highest, meanOf, ownPart, rectangle } from "./detector.js";

const FOLDS = 5, POSITION_IMAGES = 20, SCALE_SIDE = 15, FLOOR = 0.3;

// A small generator of random numbers with a seed (mulberry32): uniform, whole, normal.
export function random(seed) {
  const next = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const below = (n) => Math.floor(next() * n);
  const normals = (n) => {
    const values = new Float32Array(n);
    for (let i = 0; i < n; i += 2) {
      const length = Math.sqrt(-2 * Math.log(1 - next())), angle = 2 * Math.PI * next();
      values[i] = length * Math.cos(angle);
      if (i + 1 < n) values[i + 1] = length * Math.sin(angle);
    }
    return values;
  };
  return { next, below, normals };
}

export const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b), n = sorted.length;
  return (sorted[(n - 1) >> 1] + sorted[n >> 1]) / 2;
};

// The fold of every photo; the head of that number is trained without it.
export function splitImages(count, heads, chance) {
  const order = Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    const j = chance.below(i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  const folds = new Array(count);
  order.forEach((image, i) => { folds[image] = i % Math.min(FOLDS, heads, count); });
  return folds;
}

// features.Standardise.fit, from every channel's sum and sum of squares over `count` vectors.
export function standardisation(sum, squares, count) {
  const mean = Float32Array.from(sum, (s) => s / count);
  const std = Float64Array.from(squares, (s, i) =>
    Math.sqrt(Math.max(s / count - (sum[i] / count) ** 2, 0)));
  const floor = FLOOR * (std.reduce((a, b) => a + b, 0) / std.length);
  return { mean, std: Float32Array.from(std, (s) => Math.max(s + floor, 1e-6)) };
}

// Draws positions in proportion to their weights, as training.drawn_positions.
export function drawer(weights, chance) {
  const ends = Float64Array.from(weights);
  for (let i = 1; i < ends.length; i++) ends[i] += ends[i - 1];
  return () => {
    const place = chance.next() * ends[ends.length - 1];
    let low = 0, high = ends.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ends[middle] > place) high = middle;
      else low = middle + 1;
    }
    return low;
  };
}

// The state of a new head, (4, P): first values, their average, two moments of 0.
export function firstState(layout, chance) {
  const values = layout.flatMap(({ shape, first: [kind, size, columns] }) => {
    const n = shape.reduce((a, b) => a * b, 1);
    if (kind === "normal") {
      const sizes = columns.flatMap(([count, scale]) => new Array(count).fill(size * scale));
      return [chance.normals(n).map((x, i) => x * sizes[i % sizes.length])];
    }
    if (kind === "constant") return [new Float32Array(n).fill(size)];
    return [Float32Array.from({ length: n }, () => (2 * chance.next() - 1) * size)];
  });
  const length = values.reduce((sum, part) => sum + part.length, 0);
  const state = new Float32Array(4 * length);
  let at = 0;
  for (const part of values) {
    state.set(part, at);
    state.set(part, length + at);
    at += part.length;
  }
  return state;
}

// A trained head's tensors by name: the moving averages, the second row of its state.
export function headTensors(layout, state, averaging) {
  const tensors = {};
  let at = averaging ? state.length / 4 : 0;
  for (const { name, shape } of layout) {
    const n = shape.reduce((a, b) => a * b, 1);
    tensors[name] = state.slice(at, at + n);
    at += n;
  }
  return tensors;
}

// features.around: the mean of a square of positions, without what lies outside.
function around(map, [h, w], side) {
  const reach = side >> 1, result = new Float32Array(map.length);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      let sum = 0, count = 0;
      for (let v = Math.max(0, y - reach); v <= Math.min(h - 1, y + reach); v++) {
        for (let u = Math.max(0, x - reach); u <= Math.min(w - 1, x + reach); u++) {
          sum += map[v * w + u];
          count++;
        }
      }
      result[y * w + x] = sum / count;
    }
  }
  return result;
}

function mean(maps) {
  const result = new Float32Array(maps[0].length);
  for (const map of maps) for (let p = 0; p < map.length; p++) result[p] += map[p] / maps.length;
  return result;
}

const withoutEach = (maps) => {
  const all = mean(maps), n = maps.length;
  return maps.map((map) => map.map((value, p) => (all[p] * n - value) / (n - 1)));
};

// training.calibrate, with one head a fold. maps[image][head] are score maps of all photos,
// `photos` their widths and heights.
export function calibrate(maps, folds, config, grid, photos) {
  const heads = maps[0].map((_, k) => k), seen = rectangle(config.crop, config.ratio);
  const places = grid[0] * grid[1], centre = [], spread = [];
  for (const k of heads) {
    const own = maps.filter((_, i) => folds[i] === k).map((all) => all[k]);
    const n = own.length * places;
    const sum = own.reduce((s, map) => map.reduce((a, b) => a + b, s), 0);
    const squares = own.reduce((s, map) => map.reduce((a, b) => a + (b - sum / n) ** 2, s), 0);
    centre.push(sum / n);
    spread.push(Math.max(Math.sqrt(squares / (n - 1)), 1e-6));
  }
  const one = (map, k) => meanOf([map], [k], centre, spread);
  const means = maps.map((all, i) => one(all[folds[i]], folds[i]));
  let level = new Float32Array(places), scale = new Float32Array(places).fill(1);
  let levels = means.map(() => level), scales = means.map(() => scale);
  if (config.position_units && maps.length >= POSITION_IMAGES) {
    levels = withoutEach(means).map((map) => around(map, grid, 3));
    // Third powers: what counts are the highest scores, which become false alarms.
    const powers = means.map((map, i) => {
      const above = around(map.map((value, p) => value - levels[i][p]), grid, 3);
      return around(above.map((value) => Math.max(value, 0) ** 3), grid, SCALE_SIDE);
    });
    const root = (map) => map.map((value) => Math.max(Math.max(value, 0) ** (1 / 3), 1e-6));
    scales = withoutEach(powers).map(root);
    level = around(mean(means), grid, 3);
    scale = root(mean(powers));
  } else if (config.bound) { // one scale for all, on which no normal photo comes near the bound
    scale.fill(Math.max(...means.map(highest), 1e-6));
  }
  const scoreOf = (map, i) => {
    const units = map.map((value, p) =>
      bounded((value - levels[i][p]) / scales[i][p], config.bound));
    return highest(ownPart(anomalyMap(units, grid, seen, config.smoothing), photos[i], config).map);
  };
  let values = means.map(scoreOf);
  if (heads.length > 1) {
    // A new photo is scored by all heads, in which more noise cancels: how much lower it lies.
    const shifts = maps.map((all, i) => {
      const other = (folds[i] + 1) % heads.length;
      return scoreOf(meanOf(all, heads, centre, spread), i) - scoreOf(one(all[other], other), i);
    });
    const shift = median(shifts);
    values = values.map((value) => value + shift);
  }
  const typical = median(values);
  const rank = Math.max(1, Math.floor(config.false_alarms * (values.length + 1) + 1e-9));
  let threshold = [...values].sort((a, b) => b - a)[rank - 1];
  if (threshold <= typical) threshold = typical + 1;
  const scores = values.map((value) => (value - typical) / (threshold - typical));
  return {
    centre: Float32Array.from(centre), spread: Float32Array.from(spread), level, scale,
    typical, threshold, scores,
  };
}
