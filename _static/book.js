// What is wider than its place scrolls. Someone without a mouse reaches it with the Tab key, too.
const SCROLLING = ".bd-article div.math, .bd-article .cell_output, .bd-article div.output, mjx-container";

function reachByKeyboard() {
  for (const box of document.querySelectorAll(SCROLLING)) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

addEventListener("resize", reachByKeyboard);
addEventListener("load", async () => {
  // The theme names this button "Search", though it shows "Search Ctrl+K".
  document.querySelector(".search-button-field")?.removeAttribute("aria-label");
  // It gives the arrows that open the pages below a page no name.
  for (const arrow of document.querySelectorAll(".bd-links summary"))
    arrow.ariaLabel = `Pages below ${arrow.closest("li").querySelector("a").textContent.trim()}`;
  await window.MathJax?.startup?.promise;
  reachByKeyboard();
});
