// Opens every page of the built book in a browser and prints what is wrong with it as JSON.
//   node tests/pages.mjs ADDRESS PAGE ...
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import chromium from "@sparticuz/chromium";
import { chromium as playwright } from "playwright-core";

const [address, ...pages] = process.argv.slice(2);
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

// A theme changes colours only, so dark pages are held against the rules about colours.
const ALL = { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], resultTypes: ["violations"] };
const COLOURS = { runOnly: { type: "rule", values: ["color-contrast", "link-in-text-block"] }, resultTypes: ["violations"] };

const browser = await playwright.launch({
  executablePath: await chromium.executablePath(),
  args: ["--no-sandbox", "--disable-gpu"],
  headless: true,
});
const found = [];
try {
  for (const page of pages) found.push(await look(page));
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));

async function look(name) {
  const context = await browser.newContext({ viewport: { width: 1400, height: 900 } });
  const page = await context.newPage();
  const report = { page: name, console: [], requests: [], axe: [], unreachable: [], wide: [] };
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) report.console.push(message.text());
  });
  page.on("pageerror", (error) => report.console.push(String(error)));
  page.on("requestfailed", (request) => report.console.push(`failed: ${request.url()}`));
  page.on("request", (request) => {
    if (!request.url().startsWith(address) && !/^(data|blob):/.test(request.url()))
      report.requests.push(request.url());
  });
  await page.goto(address + name, { waitUntil: "load" });
  await page.evaluate(() => window.MathJax?.startup?.promise);
  await page.evaluate(axe);
  for (const width of [1400, 390]) {
    await page.setViewportSize({ width, height: 900 });
    await page.waitForTimeout(400); // the theme looks for what scrolls 0.3 s after a change
    for (const theme of ["light", "dark"]) {
      await page.evaluate((theme) => (document.documentElement.dataset.theme = theme), theme);
      const rules = theme === "dark" ? COLOURS : ALL;
      for (const violation of (await page.evaluate((rules) => axe.run(document, rules), rules)).violations)
        for (const node of violation.nodes)
          report.axe.push({ width, theme, rule: violation.id, target: node.target.join(" "), summary: node.failureSummary, html: node.html.slice(0, 200) });
    }
    report.unreachable.push(...(await page.evaluate(scrollingButNotFocusable)).map((box) => `${width}: ${box}`));
    if (await page.evaluate(() => document.documentElement.scrollWidth > innerWidth)) report.wide.push(width);
  }
  await context.close();
  return report;
}

function scrollingButNotFocusable() {
  const focusable = "a[href], button, input, select, textarea, summary, [tabindex='0']";
  return [...document.querySelectorAll("main *")]
    .filter((box) => box.scrollWidth > box.clientWidth + 1 && box.clientWidth > 0)
    .filter((box) => /auto|scroll/.test(getComputedStyle(box).overflowX))
    .filter((box) => !box.matches(focusable) && !box.querySelector(focusable))
    .map((box) => box.outerHTML.slice(0, 120));
}
