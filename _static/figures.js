// Figures that answer: below some pictures of the book stands one that the reader moves. This file
// places them and holds what they share; each figure is a file in figures/, which adds a function
// to `window.figures`. Plain scripts, no modules: those do not load from a folder on disk.
window.figures ??= {};

/** Each figure, and the picture it stands below. */
figures.PLACES = {
  noise: "fig-noise-length",
  boundary: "fig-discriminator-ring",
  verdict: "fig-localization-verdicts",
  promise: "fig-localization-heldout",
};

addEventListener("DOMContentLoaded", () => {
  for (const [name, id] of Object.entries(figures.PLACES)) {
    const picture = document.getElementById(id);
    if (picture) figures[name](new figures.Panel(name, picture.closest(".cell") ?? picture));
  }
});

/** One figure: a canvas, a sentence that answers, and the controls that ask. */
figures.Panel = class {
  constructor(name, after) {
    this.root = element("figure", { className: "answer", id: `answer-${name}` });
    this.canvas = element("canvas");
    this.canvas.setAttribute("role", "img");
    this.controls = element("div", { className: "answer-controls" });
    this.text = element("p", { className: "answer-text", role: "status" });
    this.caption = element("figcaption");
    this.root.append(this.canvas, this.text, this.controls, this.caption);
    after.after(this.root);
  }

  /**
   * Show the figure, and draw it anew whenever its width or the theme changes.
   * `draw(context, width, height)` works in CSS pixels; `height` may depend on the width;
   * `describe` is what a screen reader hears.
   */
  start({ caption, describe, height, draw }) {
    this.caption.textContent = caption;
    this.canvas.ariaLabel = describe;
    this.draw = () => {
      const width = this.canvas.clientWidth;
      if (!width) return;
      const ratio = devicePixelRatio;
      const tall = typeof height === "function" ? height(width) : height;
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(tall * ratio);
      this.canvas.style.height = `${tall}px`;
      const c = this.canvas.getContext("2d");
      c.scale(ratio, ratio);
      c.font = `13px ${getComputedStyle(this.root).fontFamily}`;
      c.lineJoin = "round";
      draw(c, width, tall);
    };
    new ResizeObserver(this.draw).observe(this.root);
    const themes = { attributes: true, attributeFilter: ["data-theme"] };
    new MutationObserver(this.draw).observe(document.documentElement, themes);
  }

  /** A slider. `show` makes words of its number, for the eye and for a screen reader alike. */
  slider(label, { min, max, step = 1, value, show = String, change }) {
    const input = element("input", { type: "range", min, max, step, value });
    const shown = element("span", { className: "answer-value" });
    const name = () => {
      shown.textContent = show(Number(input.value));
      input.setAttribute("aria-valuetext", shown.textContent);
    };
    input.ariaLabel = label;
    input.addEventListener("input", () => (name(), change()));
    const row = element("label");
    row.append(element("span", { textContent: label }), input, shown);
    this.controls.append(row);
    name();
    return {
      input,
      get value() {
        return Number(input.value);
      },
      set value(number) {
        input.value = number;
        name();
      },
    };
  }

  button(label, press) {
    const button = element("button", { type: "button", textContent: label });
    button.addEventListener("click", press);
    this.controls.append(button);
  }

  /** A colour of the current theme: text, muted, line, ground, normal or defect. */
  colour(name) {
    return getComputedStyle(this.root).getPropertyValue(`--answer-${name}`).trim();
  }

  /**
   * Axes in the box {left, top, width, height} of the canvas. `x` and `y` are {from, to, ticks,
   * label}; a tick is a number or a pair of a number and its text. Returns where numbers lie.
   */
  axes(c, box, x, y) {
    const scale = {
      x: (value) => box.left + ((value - x.from) / (x.to - x.from)) * box.width,
      y: (value) => box.top + (1 - (value - y.from) / (y.to - y.from)) * box.height,
    };
    const ticks = (axis) => (axis.ticks ?? []).map((tick) => (Array.isArray(tick) ? tick : [tick, tick]));
    c.strokeStyle = this.colour("line");
    c.fillStyle = this.colour("muted");
    c.strokeRect(box.left, box.top, box.width, box.height);
    c.textAlign = "center";
    c.textBaseline = "top";
    for (const [value, text] of ticks(x)) c.fillText(text, scale.x(value), box.top + box.height + 5);
    c.fillText(x.label, box.left + box.width / 2, box.top + box.height + 22);
    c.textAlign = "right";
    c.textBaseline = "middle";
    for (const [value, text] of ticks(y)) c.fillText(text, box.left - 5, scale.y(value));
    c.textAlign = "left";
    c.textBaseline = "bottom";
    c.fillText(y.label, box.left, box.top - 4);
    return scale;
  }
};

function element(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}

/** A source of random numbers, the same at every visit: uniform in [0, 1) and Gaussian. */
figures.random = (seed) => {
  const uniform = () => {
    seed = (seed + 0x6d2b79f5) | 0; // mulberry32
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const gaussian = () =>
    Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return { uniform, gaussian };
};

/** Beta distribution for whole a, b ≥ 1: the chance of a value below x. */
figures.betaCdf = (x, a, b) => {
  // At least a of a + b - 1 draws succeed: a sum of binomial terms, by their logarithms.
  if (x <= 0 || x >= 1) return x <= 0 ? 0 : 1;
  const n = a + b - 1;
  let term = logChoose(n, a) + a * Math.log(x) + (n - a) * Math.log1p(-x);
  let sum = 0;
  for (let k = a; k <= n; k++) {
    sum += Math.exp(term);
    term += Math.log(((n - k) / (k + 1)) * (x / (1 - x)));
  }
  return Math.min(1, sum);
};

/** The value below which a Beta(a, b) variable lies with the chance q. */
figures.betaQuantile = (q, a, b) => {
  let [low, high] = [0, 1];
  for (let halving = 0; halving < 50; halving++) {
    const middle = (low + high) / 2;
    if (figures.betaCdf(middle, a, b) < q) low = middle;
    else high = middle;
  }
  return low;
};

figures.betaDensity = (x, a, b) =>
  Math.exp(
    logChoose(a + b - 2, a - 1) +
      Math.log(a + b - 1) +
      (a > 1 ? (a - 1) * Math.log(x) : 0) +
      (b > 1 ? (b - 1) * Math.log1p(-x) : 0),
  );

function logChoose(n, k) {
  let sum = 0;
  for (let i = 1; i <= k; i++) sum += Math.log((n - k + i) / i);
  return sum;
}

/** A share in percent with two significant digits: 0.34%, 3.4%, 34%. */
figures.percent = (share) => {
  const value = 100 * share;
  const digits = value >= 9.95 || value === 0 ? 0 : value >= 0.995 ? 1 : 2;
  return `${value.toFixed(digits)}%`;
};
