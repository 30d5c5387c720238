// The browser that prints the book and tests its pages: on Linux the one of package.json, which
// needs no installation; elsewhere the Chrome of the machine.
import { platform } from "node:process";
import sparticuz from "@sparticuz/chromium";
import { chromium } from "playwright-core";

export async function launch() {
  return chromium.launch(
    platform === "linux"
      ? {
          executablePath: await sparticuz.executablePath(),
          args: ["--no-sandbox", "--disable-gpu", "--font-render-hinting=none"],
        }
      : { channel: "chrome" },
  );
}
