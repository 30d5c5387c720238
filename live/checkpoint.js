// The library's checkpoint: a safetensors file, which holds data only.
import { fuse, rectangle } from "./detector.js";

const TYPES = { F32: Float32Array, I64: BigInt64Array };
const size = (shape) => shape.reduce((a, b) => a * b, 1);

// What the user can mend; the message is a sentence.
export class Fault extends Error {}

// tensors: name → { dtype, shape, data }; metadata: the library's own, a dictionary of strings.
export function write(tensors, metadata) {
  const names = Object.keys(tensors).sort();
  names.sort((a, b) => (tensors[b].dtype === "I64") - (tensors[a].dtype === "I64"));
  const sorted = Object.fromEntries(Object.entries(metadata).sort());
  const header = { __metadata__: { simplenet: JSON.stringify(sorted) } };
  let end = 0;
  for (const name of names) {
    const { dtype, shape, data } = tensors[name];
    header[name] = { dtype, shape, data_offsets: [end, (end += data.byteLength)] };
  }
  let text = JSON.stringify(header);
  text = text.padEnd(Math.ceil(text.length / 8) * 8); // all of it is ASCII
  const file = new Uint8Array(8 + text.length + end);
  new DataView(file.buffer).setBigUint64(0, BigInt(text.length), true);
  file.set(new TextEncoder().encode(text), 8);
  for (const name of names) {
    const { data } = tensors[name];
    file.set(
      new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
      8 + text.length + header[name].data_offsets[0],
    );
  }
  return file;
}

export function read(bytes) {
  try {
    const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
    if (length > bytes.length - 8) throw new Error("too short");
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
    const metadata = JSON.parse(header.__metadata__?.simplenet ?? "{}");
    delete header.__metadata__;
    const tensors = {};
    for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
      const Type = TYPES[dtype], part = bytes.slice(8 + length + from, 8 + length + to);
      if (part.length !== size(shape) * Type.BYTES_PER_ELEMENT) throw new Error(name);
      tensors[name] = { dtype, shape, data: new Type(part.buffer) };
    }
    return { tensors, metadata };
  } catch {
    throw new Fault("is not a readable checkpoint: choose the file model.safetensors that simplenet train or this page has written.");
  }
}

// A checkpoint as a detector of this page, whose backbone has one set of layers and weights.
export function asModel({ tensors, metadata }, page) {
  if (metadata.format !== page.format) {
    const found = metadata.format ? `it says ${metadata.format}` : "it names no format";
    throw new Fault(`is not a model that this page reads (${found}, not ${page.format}).`);
  }
  const config = JSON.parse(metadata.config);
  for (const name of ["backbone", "layers", "border", "neighbourhood", "tile"]) {
    const [found, here] = [config, page.config].map((one) => JSON.stringify(one[name] ?? 0));
    if (found !== here) {
      throw new Fault(`was trained with ${name} ${found}; this page reads models with ${name} ${here}, as the preset fast has it.`);
    }
  }
  if (metadata.weights !== page.weights) {
    throw new Fault(`was trained on other pretrained weights of ${config.backbone} than this page has.`);
  }
  const seen = rectangle(config.crop, config.ratio);
  if (seen.some((side) => side % 16)) {
    throw new Fault(`sees ${seen[1]} x ${seen[0]} pixels; this page needs multiples of 16.`);
  }
  const grid = seen.map((side) => side / page.stride);
  const of = (name, n) => {
    const tensor = tensors[name];
    if (tensor?.dtype !== "F32" || tensor.data.length !== n || !tensor.data.every(Number.isFinite)) {
      throw new Fault(`is damaged: ${name} does not fit its configuration.`);
    }
    return tensor.data;
  };
  const { heads, adaptor_channels: A, hidden_channels: H } = config, C = page.channels;
  of("standardise.mean", C);
  of("standardise.std", C);
  for (let k = 0; k < heads; k++) {
    of(`heads.${k}.adaptor.linear.weight`, A * C);
    of(`heads.${k}.adaptor.linear.bias`, A);
    of(`heads.${k}.discriminator.hidden.weight`, H * A);
    of(`heads.${k}.discriminator.hidden.bias`, H);
    of(`heads.${k}.discriminator.score.weight`, H);
    for (const name of config.batchnorm ? ["weight", "bias", "running_mean", "running_var"] : []) {
      of(`heads.${k}.discriminator.norm.${name}`, H);
    }
  }
  const typical = Number(metadata.typical), threshold = Number(metadata.threshold);
  if (!Number.isFinite(typical) || !Number.isFinite(threshold)) {
    throw new Fault("holds no threshold; it was never trained.");
  }
  return {
    config, grid, typical, threshold, fused: fuse(tensors, config),
    centre: of("centre", heads), spread: of("spread", heads),
    level: of("level", size(grid)), scale: of("scale", size(grid)),
  };
}
