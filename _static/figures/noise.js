// How long noise of a given σ is in A channels, beside the step between two normal vectors.
(window.figures ??= {}).noise = (panel) => {
  const STEP = 13; // from a new normal vector of the nuts to the nearest known one, 512 channels
  const COUNT = 4000;
  const SIGMAS = [0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2];
  const CHANNELS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 4096];
  const BINS = 120;
  let unit = []; // lengths of noise with σ = 1

  const redraw = () => {
    answer();
    panel.draw();
  };
  const resample = () => {
    sample();
    redraw();
  };
  const channels = panel.slider("Channels A", {
    max: CHANNELS.length - 1, min: 0, value: CHANNELS.indexOf(512), change: resample,
    show: (index) => CHANNELS[index].toLocaleString("en"),
  });
  const sigma = panel.slider("σ", {
    max: SIGMAS.length - 1, min: 0, value: SIGMAS.indexOf(0.5), change: redraw,
    show: (index) => String(SIGMAS[index]),
  });
  const A = () => CHANNELS[channels.value];
  const s = () => SIGMAS[sigma.value];

  /** The square of a length is a sum of A squares: twice a gamma variable with shape A/2. */
  function sample() {
    const random = figures.random(A());
    unit = Array.from({ length: COUNT }, () => Math.sqrt(2 * gamma(A() / 2, random)));
  }

  function answer() {
    const mean = (s() * unit.reduce((sum, length) => sum + length, 0)) / COUNT;
    const spread = Math.sqrt(unit.reduce((sum, length) => sum + (s() * length - mean) ** 2, 0) / COUNT);
    const words = [
      `σ√A = ${number(s() * Math.sqrt(A()))}. The ${COUNT.toLocaleString("en")} lengths drawn are ` +
        `${number(mean)} ± ${number(spread, 2)}, a spread of ${figures.percent(spread / mean)}.`,
    ];
    if (A() === 512) {
      const nearer = normalCdf((-512 * s()) / (2 * STEP));
      words.push(
        `The step to the nearest normal vector is ${STEP}; with this noise ` +
          `${nearer < 0.00005 ? "none" : figures.percent(nearer)} of the vectors come nearer to it.`,
      );
    } else {
      words.push("Choose 512 channels to see the step between normal vectors of the nuts beside it.");
    }
    panel.text.textContent = words.join(" ");
  }

  function draw(c, width, height) {
    const to = Math.max(2.2 * Math.sqrt(A()), 4.4); // holds σ = 2
    const bins = new Array(BINS).fill(0);
    for (const length of unit) {
      const bin = Math.floor(((s() * length) / to) * BINS);
      if (bin < BINS) bins[bin]++;
    }
    const top = Math.max(...bins) * 1.3;
    const round = [0.5, 1, 2, 5, 10, 20, 50].find((step) => to / step <= 6);
    const ticks = [];
    for (let tick = 0; tick <= to; tick += round) ticks.push(tick);
    const box = { left: 16, top: 24, width: width - 36, height: height - 72 };
    const at = panel.axes(c, box, { from: 0, to, ticks, label: "length" }, { from: 0, to: top, label: "how often" });
    c.fillStyle = panel.colour("defect");
    bins.forEach((count, bin) => {
      const left = at.x((bin / BINS) * to);
      c.fillRect(left, at.y(count), at.x(((bin + 1) / BINS) * to) - left, at.y(0) - at.y(count));
    });

    const length = s() * Math.sqrt(A());
    const marks = [[length, "σ√A", "defect"]];
    if (A() === 512) marks.push([STEP, "step between normal vectors", "normal"]);
    marks.sort(([a], [b]) => a - b);
    for (const [i, [value, name, colour]] of marks.entries()) {
      c.strokeStyle = panel.colour(colour);
      c.lineWidth = 2;
      c.setLineDash(colour === "normal" ? [] : [5, 4]);
      c.beginPath();
      c.moveTo(at.x(value), at.y(0));
      c.lineTo(at.x(value), box.top + 2);
      c.stroke();
      c.setLineDash([]);
      const wide = c.measureText(name).width + 8;
      // The left of two marks has its name on its left, if there is room.
      const room = marks.length === 2 && i === 0
        ? at.x(value) - wide < box.left
        : at.x(value) + wide < box.left + box.width;
      c.textAlign = room ? "left" : "right";
      c.textBaseline = "top";
      c.fillStyle = panel.colour("text");
      c.fillText(name, at.x(value) + (room ? 6 : -6), box.top + 5 + 18 * i);
    }
  }

  panel.start({
    caption:
      "Choose σ and the number of channels. With more channels the lengths grow, and their spread " +
      "stays the same: beside the length it vanishes. The picture above stays for paper.",
    describe: "Histogram of lengths of noise; the sentence below has its numbers.",
    height: 240,
    draw,
  });
  sample();
  answer();

  function number(value, digits = 3) {
    return String(+value.toPrecision(digits));
  }

  /** Marsaglia and Tsang (2000), for any shape. */
  function gamma(shape, random) {
    if (shape < 1) return gamma(shape + 1, random) * (1 - random.uniform()) ** (1 / shape);
    const d = shape - 1 / 3;
    for (;;) {
      const x = random.gaussian();
      const v = (1 + x / Math.sqrt(9 * d)) ** 3;
      if (v > 0 && Math.log(1 - random.uniform()) < x * x / 2 + d - d * v + d * Math.log(v)) return d * v;
    }
  }

  /** Abramowitz and Stegun 26.2.17: right to 1e-7. */
  function normalCdf(z) {
    const t = 1 / (1 + 0.2316419 * Math.abs(z));
    const series = t * (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))));
    const tail = (Math.exp((-z * z) / 2) / Math.sqrt(2 * Math.PI)) * series;
    return z < 0 ? tail : 1 - tail;
  }
};
