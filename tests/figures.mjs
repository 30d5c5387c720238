// Moves the figures of _static/figures in a browser, as a reader would, and prints what they say.
//   node tests/figures.mjs FOLDER     with page.html, empty.html and network.json
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { launch } from "../_ext/browser.mjs";

const folder = pathToFileURL(`${process.argv[2]}/`).href;
const job = JSON.parse(await readFile(new URL("network.json", folder)));
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const report = { errors: [], axe: [], wide: [] };

const browser = await launch();
try {
  const context = await browser.newContext({ viewport: { width: 390, height: 900 }, hasTouch: true });
  const page = await context.newPage();
  page.setDefaultTimeout(60_000);
  page.on("console", (message) => report.errors.push(message.text()));
  page.on("pageerror", (error) => report.errors.push(String(error)));

  await page.goto(`${folder}empty.html`);
  report.empty = await page.locator(".answer").count();
  await page.goto(`${folder}page.html`);
  report.order = await page.$$eval("main > *", (parts) => parts.map((part) => part.id));

  const figure = (name) => page.locator(`#answer-${name}`);
  const said = (name) => figure(name).locator(".answer-text").textContent();
  const slider = (name, label) => figure(name).getByRole("slider", { name: label, exact: true });
  const shown = (name, label) => slider(name, label).getAttribute("aria-valuetext");
  const press = async (name, label, ...keys) => {
    for (const key of keys) await slider(name, label).press(key);
  };
  const picture = (name) => figure(name).locator("canvas").evaluate((canvas) => canvas.toDataURL());
  const times = (count, key) => Array(count).fill(key);

  report.noise = [];
  for (const [label, keys] of [
    ["σ", []], ["σ", times(11, "ArrowLeft")], ["σ", times(3, "ArrowRight")],
    ["Channels A", ["Home"]], ["Channels A", times(4, "ArrowRight")], ["σ", ["End"]], ["Channels A", ["End"]],
  ]) {
    const before = await picture("noise");
    await press("noise", label, ...keys);
    report.noise.push({
      channels: await shown("noise", "Channels A"), sigma: await shown("noise", "σ"),
      text: await said("noise"), redrawn: !keys.length || before !== (await picture("noise")),
    });
  }

  report.promise = [];
  for (const [label, keys] of [
    ["Held-out photos n", []], ["Held-out photos n", times(21, "ArrowRight")],
    ["Threshold’s rank k", ["End"]], ["Held-out photos n", ["Home"]], ["Held-out photos n", times(5, "ArrowRight")],
    ["Held-out photos n", ["End"]], ["Threshold’s rank k", times(3, "ArrowRight")],
  ]) {
    await press("promise", label, ...keys);
    report.promise.push({
      n: await shown("promise", "Held-out photos n"), k: await shown("promise", "Threshold’s rank k"),
      text: await said("promise"),
    });
  }
  report.beta = await page.evaluate(
    (cases) => cases.map(([x, a, b]) => [figures.betaCdf(x, a, b), figures.betaQuantile(x, a, b), figures.betaDensity(x, a, b)]),
    job.beta,
  );

  report.verdict = [];
  const verdict = async (how) =>
    report.verdict.push({
      how, threshold: await shown("verdict", "Threshold"), rate: await shown("verdict", "Base rate of defects"),
      cells: await figure("verdict").locator("tbody td").allTextContents(), text: await said("verdict"),
    });
  await verdict("start");
  for (const [label, keys] of [
    ["Threshold", times(30, "ArrowLeft")], ["Base rate of defects", ["End"]], ["Threshold", ["Home"]],
    ["Threshold", ["End"]], ["Base rate of defects", ["Home"]], ["Threshold", times(4, "PageDown")],
  ]) {
    await press("verdict", label, ...keys);
    await verdict("keys");
  }
  const canvas = figure("verdict").locator("canvas");
  await canvas.scrollIntoViewIfNeeded();
  const box = await canvas.boundingBox();
  await page.touchscreen.tap(box.x + 0.3 * box.width, box.y + 60);
  await verdict("touch");
  await page.mouse.move(box.x + 0.3 * box.width, box.y + 60);
  await page.mouse.down();
  await page.mouse.move(box.x + 0.6 * box.width, box.y + 60, { steps: 3 });
  await page.mouse.up();
  await verdict("drag");
  await page.mouse.move(box.x + 0.8 * box.width, box.y + 60); // let go: it stays
  await verdict("hover");

  const trained = async () => {
    await page.waitForFunction(() => document.querySelector("#answer-boundary").dataset.trained);
    return said("boundary");
  };
  await figure("boundary").scrollIntoViewIfNeeded();
  report.boundary = { start: await trained() };
  await figure("boundary").getByRole("button").press("Enter");
  report.boundary.other = await trained();
  await press("boundary", "σ of the noise", ...times(4, "ArrowLeft"));
  report.boundary.little = [await shown("boundary", "σ of the noise"), await trained()];
  await press("boundary", "σ of the noise", ...times(4, "ArrowRight"));
  await press("boundary", "Hidden units K", "Home");
  report.boundary.one = await trained();
  report.network = await page.evaluate(({ weights, batches }) => {
    const network = new figures.Network(weights.length / 4, Math.random);
    network.weights.set(weights);
    for (const [normal, noisy] of batches) network.step(normal, noisy);
    return { weights: [...network.weights], scores: batches[0][0].map(([x, y]) => network.score(x, y)) };
  }, job);

  await page.evaluate(axe);
  for (const width of [1400, 390]) {
    await page.setViewportSize({ width, height: 900 });
    for (const theme of ["light", "dark"]) {
      const found = await page.evaluate(async (theme) => {
        document.documentElement.dataset.theme = theme;
        const wcag = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"];
        const { violations } = await axe.run(document, { runOnly: wcag, preload: false });
        return violations.flatMap(({ id, nodes }) => nodes.map((node) => `${id}: ${node.html}`));
      }, theme);
      report.axe.push(...found.map((one) => `${width} ${theme} ${one}`));
    }
    if (await page.evaluate(() => document.documentElement.scrollWidth > innerWidth)) report.wide.push(width);
  }
  report.scores = await page.evaluate(() => figures.SCORES);
  const light = await picture("noise");
  await page.evaluate(() => (document.documentElement.dataset.theme = "light"));
  report.themed = light !== (await picture("noise"));
  await page.emulateMedia({ media: "print" });
  report.printed = await page.locator(".answer:visible").count();
} finally {
  await browser.close();
}
console.log(JSON.stringify(report));
