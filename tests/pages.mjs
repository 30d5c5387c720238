// Opens pages of a built book in a browser and prints as JSON what is wrong with each.
//   node tests/pages.mjs ADDRESS PAGE ...
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { launch } from "../_ext/browser.mjs";

const [address, ...pages] = process.argv.slice(2);
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"];
// A theme changes colours and nothing else, so the dark pages are held against these.
const COLOURS = { type: "rule", values: ["color-contrast", "link-in-text-block"] };

const browser = await launch();
try {
  const found = [];
  for (const page of pages) found.push(await look(page));
  console.log(JSON.stringify(found));
} finally {
  await browser.close();
}

async function look(name) {
  const context = await browser.newContext({ viewport: { width: 1400, height: 900 } });
  const page = await context.newPage();
  page.setDefaultTimeout(120_000);
  const report = { page: name, console: [], requests: [], axe: [], unreachable: [], wide: [] };
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) report.console.push(message.text());
  });
  page.on("pageerror", (error) => report.console.push(String(error)));
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(address) && !/^(data|blob):/.test(url)) report.requests.push(url);
  });

  // The first text of a page on a processor of a quarter of this one's speed, in milliseconds.
  const devtools = await context.newCDPSession(page);
  await devtools.send("Emulation.setCPUThrottlingRate", { rate: 4 });
  await page.goto(address + name, { waitUntil: "load" });
  await devtools.send("Emulation.setCPUThrottlingRate", { rate: 1 });
  await page.evaluate(() => window.MathJax?.startup.promise);
  report.firstText = await page.evaluate(firstText);
  report.rawFormulas = await page.evaluate(
    () => [...document.querySelectorAll(".math")].filter((m) => !m.querySelector("mjx-math")).length,
  );

  await page.evaluate(axe);
  for (const width of [1400, 390]) {
    await page.setViewportSize({ width, height: 900 });
    await page.waitForTimeout(400); // the theme looks for what scrolls 0.3 s after a change
    for (const theme of ["light", "dark"]) {
      const options = {
        runOnly: theme === "dark" ? COLOURS : WCAG,
        resultTypes: ["violations"],
        preload: address.startsWith("http"), // from disk axe cannot fetch the styles once more
      };
      const { violations } = await page.evaluate(
        ([theme, options]) => {
          document.documentElement.dataset.theme = theme;
          return axe.run(document, options);
        },
        [theme, options],
      );
      for (const { id, nodes } of violations)
        for (const node of nodes)
          report.axe.push({ rule: id, width, theme, html: node.html.slice(0, 200), why: node.failureSummary });
    }
    report.unreachable.push(...(await page.evaluate(scrollsWithoutFocus)));
    const wide = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
    if (wide) report.wide.push(width);
  }
  await context.close();
  return report;
}

/** When the browser first painted text or a picture, once it has. */
function firstText() {
  return new Promise((resolve) => {
    new PerformanceObserver((list) => {
      for (const { name, startTime } of list.getEntries())
        if (name === "first-contentful-paint") resolve(startTime);
    }).observe({ type: "paint", buffered: true });
  });
}

/** Boxes that scroll sideways and that the Tab key passes over. */
function scrollsWithoutFocus() {
  const focusable = "a[href], button, input, select, textarea, summary, [tabindex='0']";
  return [...document.querySelectorAll("main *")]
    .filter((box) => box.scrollWidth > box.clientWidth + 1 && box.clientWidth > 0)
    .filter((box) => /auto|scroll/.test(getComputedStyle(box).overflowX))
    .filter((box) => !box.matches(focusable) && !box.querySelector(focusable))
    .map((box) => box.outerHTML.slice(0, 200));
}
