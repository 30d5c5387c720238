// Prints a page of formulas and figures:  node print.mjs PAGE.html FILE.pdf
import { pathToFileURL } from "node:url";
import { launch } from "./browser.mjs";

const [source, target] = process.argv.slice(2);
const browser = await launch();
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(0); // a busy machine may need minutes for a thousand formulas
  await page.goto(pathToFileURL(source).href);
  await page.evaluate(() => MathJax.startup.promise);
  await page.pdf({
    path: target,
    format: "A4",
    margin: { top: "18mm", bottom: "20mm", left: "18mm", right: "18mm" },
    printBackground: true,
    outline: true,
    tagged: true,
    displayHeaderFooter: true,
    headerTemplate: "<span></span>",
    footerTemplate:
      '<div style="font: 8pt sans-serif; width: 100%; text-align: center" class="pageNumber"></div>',
  });
} finally {
  await browser.close();
}
