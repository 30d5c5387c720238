// Uses the page "Try it" in a real browser as a reader would. test_try.py calls it with a job and
// compares what it reports with the library:  node tests/try.mjs JOB.json REPORT.json
import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";
import http from "node:http";
import path from "node:path";
import sparticuz from "@sparticuz/chromium";
import { chromium } from "playwright-core";

const [jobFile, reportFile] = process.argv.slice(2);
const job = JSON.parse(fs.readFileSync(jobFile));
const report = { requests: [], errors: [] };
const AXE = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const TYPES = {
  ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css",
  ".json": "application/json", ".wasm": "application/wasm", ".webp": "image/webp",
};

// A plain static host: no special headers. `spoil` damages a file on its way.
let spoil = "";
const server = http.createServer((request, response) => {
  const name = decodeURIComponent(new URL(request.url, "http://host").pathname);
  const file = path.join(job.root, name);
  if (!fs.existsSync(file)) return response.writeHead(404).end();
  const data = fs.readFileSync(file);
  if (spoil && name.endsWith(spoil)) data[data.length >> 1] ^= 1;
  response.writeHead(200, { "content-type": TYPES[path.extname(file)] ?? "application/octet-stream" });
  response.end(data);
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const home = `http://127.0.0.1:${server.address().port}`;

const browser = await chromium.launch({
  executablePath: await sparticuz.executablePath(), args: ["--no-sandbox"], headless: true,
});
const context = await browser.newContext({ viewport: { width: 390, height: 800 } });
const page = await context.newPage();
page.setDefaultTimeout(job.patience * 1000);
page.on("pageerror", (error) => report.errors.push(String(error)));
page.on("console", (message) => message.type() === "error" && report.errors.push(message.text()));
context.on("request", (request) => report.requests.push(request.url().replace(home, "")));

const text = (id) => page.textContent(`#${id}`);
const says = (id, words) => page.waitForFunction(
  ([id, words]) => new RegExp(words).test(document.getElementById(id).textContent), [id, words],
).catch(async () => { throw new Error(`#${id} says "${await text(id)}", not ${words}`); });
const open = async () => {
  await page.goto(`${home}/try.html`);
  await page.waitForSelector("html[data-try=ready]");
};

// What is there before anything is loaded, on a device with little memory.
await page.addInitScript(() => Object.defineProperty(navigator, "deviceMemory", { value: 2 }));
await open();
report.before = [...new Set(report.requests)];
report.memory = await page.innerText("#try-memory");
report.answers = await page.$$eval("#nut-answers figcaption", (all) => all.map((one) => one.textContent));
const axe = async () => {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => axe.run(document, {
    runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"],
  }));
  return violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(" ")}`);
};

// A file that arrives damaged is refused; then the detector loads.
spoil = "backbone.onnx";
await page.click("#nut-load");
await says("nut-status", "damaged");
report.damaged = await text("nut-status");
spoil = "";
await page.click("#nut-load");
await page.waitForSelector("#nut-photo[data-score]");
report.clean = Number(await page.getAttribute("#nut-photo", "data-score"));

// Scratched by keyboard: space puts the tip down, arrows draw. Then by mouse, then cleaned.
const another = (old) => page.waitForFunction(
  (old) => Number(document.getElementById("nut-photo").dataset.score) !== old, old);
const settle = async () => { // until the score belongs to what is drawn
  for (let last; last !== (last = await page.getAttribute("#nut-photo", "data-score"));) {
    await page.waitForTimeout(1500);
  }
  return Number(await page.getAttribute("#nut-photo", "data-score"));
};
await page.focus("#nut-photo");
for (const key of ["ArrowLeft", "Shift+ArrowLeft", "Space", "Shift+ArrowUp", "Shift+ArrowUp", "ArrowRight", "Space"]) {
  await page.keyboard.press(key);
}
await another(report.clean);
report.scratched = await settle();
report.picture = await page.$eval("#nut-photo", (canvas) => canvas.toDataURL("image/png"));
await page.locator("#nut-photo").scrollIntoViewIfNeeded();
const box = await page.locator("#nut-photo").boundingBox();
await page.mouse.move(box.x + 40, box.y + 40);
await page.mouse.down();
await page.mouse.move(box.x + 120, box.y + 120, { steps: 4 });
await page.mouse.up();
await another(report.scratched);
report.more = await settle();
await page.click("#nut-clean");
await another(report.more);
report.cleaned = await settle();

// Bad input gets a sentence.
await page.hover("#own");
await page.waitForFunction(() => performance.getEntriesByType("resource").some(({ name }) => name.endsWith("own.js")));
report.sentences = {};
for (const [name, file] of Object.entries(job.bad)) {
  await page.setInputFiles("#own-good", file);
  await says("own-status", path.basename(file));
  report.sentences[name] = await text("own-status");
}
await page.setInputFiles("#own-good", job.good.slice(0, 2));
await says("own-status", "^2 good");
await page.click("#own-train");
report.sentences.two = await text("own-status");
await page.setInputFiles("#own-model", job.bad.text);
await says("own-status", "checkpoint");
report.sentences.model = await text("own-status");
await page.setInputFiles("#own-model", job.tiles);
await says("own-status", "tile");
report.sentences.tiles = await text("own-status");

// A training that is cancelled, and one that is not.
await page.setInputFiles("#own-good", job.good.slice(2));
await says("own-status", `^${job.good.length} good`);
await page.click("#own-train");
await says("own-status", "step");
await page.click("#own-cancel");
await says("own-status", "^Cancelled");
await page.click("#own-train");
await says("own-status", "^Trained");
report.trained = await text("own-status");
report.good = await page.$$eval("#own-list span", (all) => all.map((one) => Number(one.textContent)));
const [download] = await Promise.all([page.waitForEvent("download"), page.click("#own-save")]);
await download.saveAs(job.checkpoint);

const judge = async () => {
  await page.setInputFiles("#own-photos", job.test);
  await page.waitForFunction((n) => document.querySelectorAll("#test-list figure").length === n, job.test.length);
  const scores = await page.$$eval("#test-list figure", (all) => all.map((one) => Number(one.dataset.score)));
  await page.evaluate(() => document.getElementById("test-list").replaceChildren());
  return scores.reverse(); // the newest stands first
};
report.own = await judge();
report.violations = await axe();

// A model of the library's, dropped onto the page.
const model = fs.readFileSync(job.model).toString("base64");
await page.evaluate((model) => {
  const bytes = Uint8Array.from(atob(model), (letter) => letter.charCodeAt(0));
  const dropped = new DataTransfer();
  dropped.items.add(new File([bytes], "model.safetensors"));
  document.getElementById("own").dispatchEvent(
    new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
}, model);
await says("own-status", "5 heads");
report.library = await judge();

// Without a network, after a visit: the page, the detector and a training are all there.
await page.evaluate(() => navigator.serviceWorker.ready);
await context.setOffline(true);
server.close();
server.closeAllConnections();
report.errors = report.errors.filter((one) => !one.includes("favicon"));
await page.reload();
await page.waitForSelector("html[data-try=ready]");
await page.click("#nut-load");
await page.waitForSelector("#nut-photo[data-score]");
report.offline = Number(await page.getAttribute("#nut-photo", "data-score"));
await browser.close();

assert.ok(report.requests.length);
fs.writeFileSync(reportFile, JSON.stringify(report));
