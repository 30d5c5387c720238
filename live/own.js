// Own photos: choose, train, keep the detector, try it.
import { $, ask, loaded, paint, say, stop, verdict } from "./try.js";

const FEWEST = 10, MOST = 50, MEGAPIXELS = 50, SHOWN = 12;
const good = []; // { file, ratio, item }
let running;

// Size and a small picture, before anything large is decoded.
async function look(file) {
  const image = new Image(), address = URL.createObjectURL(file);
  try {
    image.src = address;
    await new Promise((resolve, reject) => Object.assign(image, { onload: resolve, onerror: reject }));
  } catch {
    throw new Error(/\.hei[cf]$/i.test(file.name) || /hei[cf]/.test(file.type)
      ? `${file.name} is a HEIC photo, which this browser cannot read: save or send it as JPEG.`
      : `${file.name} is not a picture that this browser can read: choose JPEG, PNG or WebP.`);
  } finally {
    URL.revokeObjectURL(address);
  }
  const { naturalWidth: width, naturalHeight: height } = image;
  if (width * height > MEGAPIXELS * 1e6) {
    throw new Error(`${file.name} has ${Math.round((width * height) / 1e6)} megapixels; ${MEGAPIXELS} at most: make it smaller.`);
  }
  return { width, height };
}

// A small picture with this shorter side, decoded outside of the page's own thread.
async function reduced(file, { width, height }, side) {
  const [resizeWidth, resizeHeight] = [width, height].map((length) =>
    Math.max(1, Math.round((length * side) / Math.min(width, height))));
  try {
    return await createImageBitmap(file, { resizeWidth, resizeHeight, resizeQuality: "medium" });
  } catch {
    throw new Error(`${file.name} cannot be decoded: it is damaged, or too large for this device.`);
  }
}

async function add(files) {
  const faults = [];
  for (const file of files) {
    if (good.length === MOST) {
      faults.push(`More than ${MOST} photos are not needed: the first ${MOST} are taken.`);
      break;
    }
    try {
      const size = await look(file), picture = await reduced(file, size, 72);
      const item = document.createElement("li"), small = document.createElement("canvas");
      Object.assign(small, { width: 72, height: 72 });
      small.getContext("2d").drawImage(picture, (72 - picture.width) / 2, (72 - picture.height) / 2);
      item.append(small, document.createElement("span"));
      item.title = file.name;
      $("own-list").append(item);
      good.push({ file, ratio: size.height / size.width, item });
    } catch (error) {
      faults.push(error.message);
    }
  }
  say("own-status", [`${good.length} good photos.`, ...faults].join(" "));
  $("own-clear").hidden = !good.length;
}

async function trainOwn() {
  if (good.length < FEWEST) {
    return say("own-status", `${good.length} photos are too few: choose ${FEWEST} to ${MOST} photos of good parts.`);
  }
  const stages = {
    features: (at) => `Looking at photo ${at.done + 1} of ${at.total}`,
    steps: (at) => `Training: step ${at.done} of ${at.total}, loss ${at.loss.toFixed(2)}`,
    threshold: (at) => `Finding the threshold: photo ${at.done + 1} of ${at.total}`,
  };
  busy(true);
  try {
    await loaded("own-bar", "own-status");
    $("own-bar").hidden = false;
    running = ask("train", { photos: good.map(({ file }) => file), ratios: good.map(({ ratio }) => ratio) }, (at) => {
      Object.assign($("own-bar"), { max: at.total, value: at.done });
      say("own-status", `${stages[at.stage](at)}.`);
    });
    const result = await running;
    if (!result) return say("own-status", "Cancelled. Your photos are still here.");
    result.scores.forEach((score, i) => {
      const { item } = good[i];
      item.lastChild.textContent = score.toFixed(2);
      item.classList.toggle("anomalous", score > 1);
    });
    const odd = result.scores.filter((score) => score > 1).length;
    ready(`Trained on ${good.length} photos in ${Math.round(result.seconds.all)} s. Below each photo is its score by the heads that have not seen it${odd ? `; ${odd} above 1: look whether it is as good as the others` : ""}.`);
    const link = $("own-save");
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(new Blob([result.checkpoint]));
    link.hidden = false;
  } catch (error) {
    say("own-status", error.message);
  } finally {
    running = undefined;
    busy(false);
  }
}

function busy(on) {
  for (const id of ["own-train", "own-clear", "own-good", "own-camera", "own-model", "own-photos"]) $(id).disabled = on;
  $("own-cancel").hidden = !on;
  $("own-bar").hidden = !on;
}

function ready(text) {
  $("own-test").hidden = false;
  say("own-status", text);
}

async function openModel(file) {
  try {
    await loaded("own-bar", "own-status");
    const { config } = await ask("open", { bytes: new Uint8Array(await file.arrayBuffer()) });
    $("own-save").hidden = true;
    ready(`${file.name}: a detector of ${config.heads} ${config.heads > 1 ? "heads" : "head"} at ${config.crop} pixels. Give it a photo.`);
  } catch (error) {
    say("own-status", `${file.name} ${error.message}`);
  }
}

async function test(files) {
  for (const file of files) {
    try {
      const picture = await reduced(file, await look(file), 240);
      say("test-status", `Looking at ${file.name} …`);
      const result = await ask("predict", { model: "own", photo: file });
      const figure = document.createElement("figure"), stage = document.createElement("div");
      const photo = document.createElement("canvas"), map = document.createElement("canvas");
      stage.className = "try-stage";
      Object.assign(photo, { width: picture.width, height: picture.height });
      photo.getContext("2d").drawImage(picture, 0, 0);
      paint(map, result);
      place(map, result.box);
      stage.append(photo, map);
      const caption = document.createElement("figcaption");
      caption.textContent = `${file.name}: ${verdict(result.score)}`;
      figure.classList.toggle("anomalous", result.score > 1);
      figure.dataset.score = result.score;
      figure.append(stage, caption);
      $("test-list").prepend(figure);
      while ($("test-list").children.length > SHOWN) $("test-list").lastChild.remove();
      say("test-status", caption.textContent);
    } catch (error) {
      say("test-status", error.message);
    }
  }
}

// The map covers the part of the photo that the network sees: a box in shares of the photo.
function place(map, [left, top, width, height]) {
  const percent = (share) => `${100 * share}%`;
  Object.assign(map.style, {
    left: percent(left), top: percent(top), width: percent(width), height: percent(height),
  });
}

function chosen(id, use) {
  const take = () => {
    const files = [...$(id).files];
    $(id).value = ""; // the same file may be chosen again
    if (files.length) use(files);
  };
  $(id).addEventListener("change", take);
  take(); // what was chosen before this script came
}

function droppable(element, use) {
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    if ($("own-train").disabled) return; // a training runs
    const files = [...event.dataTransfer.files];
    const model = files.find(({ name }) => name.endsWith(".safetensors"));
    if (model) openModel(model);
    else use(files);
  });
}

chosen("own-good", add);
chosen("own-camera", add);
chosen("own-photos", test);
chosen("own-model", ([file]) => openModel(file));
droppable($("own"), add);
droppable($("own-test"), test);
$("own-train").addEventListener("click", trainOwn);
$("own-cancel").addEventListener("click", () => (running ? running.cancel() : stop("Cancelled.")));
$("own-clear").addEventListener("click", () => {
  good.length = 0;
  $("own-list").replaceChildren();
  say("own-status", "");
  $("own-clear").hidden = true;
});
