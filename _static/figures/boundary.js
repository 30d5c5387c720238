// The discriminator of the chapter, trained while you look: σ and width against its boundary.
(window.figures ??= {}).boundary = (panel) => {
  const STEPS = 500;
  const POINTS = 256; // drawn anew at every step, as in the chapter
  const REACH = 5.5; // of the plane on either side
  const GRID = 72;
  const SIGMAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2];
  const WIDTHS = [1, 2, 3, 4, 6, 8, 12, 16, 32, 64];
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let [seed, network, random, step, frame] = [1, null, null, 0, 0];

  const train = () => {
    cancelAnimationFrame(frame);
    random = figures.random(seed);
    network = new figures.Network(WIDTHS[width.value], random.uniform);
    step = 0;
    panel.root.dataset.trained = "";
    panel.text.textContent = "Training …";
    frame = requestAnimationFrame(go);
  };
  const sigma = panel.slider("σ of the noise", {
    min: 0, max: SIGMAS.length - 1, value: SIGMAS.indexOf(1), change: train,
    show: (index) => String(SIGMAS[index]),
  });
  const width = panel.slider("Hidden units K", {
    min: 0, max: WIDTHS.length - 1, value: WIDTHS.indexOf(64), change: train,
    show: (index) => String(WIDTHS[index]),
  });
  panel.button("Train with another start", () => {
    seed++;
    train();
  });

  /** Ten steps at a time, so that the page answers meanwhile. */
  function go() {
    const until = Math.min(STEPS, step + (calm.matches ? 50 : 10));
    for (; step < until; step++) {
      const normal = ring(POINTS, random);
      network.step(normal, noisy(normal, random));
    }
    const done = step === STEPS;
    if (done) answer();
    if (done || !calm.matches) panel.draw();
    if (!done) frame = requestAnimationFrame(go);
  }

  function ring(count, { uniform }) {
    return Array.from({ length: count }, () => {
      const angle = 2 * Math.PI * uniform();
      return [3 * Math.cos(angle), 3 * Math.sin(angle)];
    });
  }

  function noisy(points, { gaussian }) {
    const s = SIGMAS[sigma.value];
    return points.map(([x, y]) => [x + s * gaussian(), y + s * gaussian()]);
  }

  function answer() {
    const other = figures.random(999);
    const normal = ring(2000, other);
    const above = (points) =>
      figures.percent(points.filter(([x, y]) => network.score(x, y) > 0).length / points.length);
    const centre = network.score(0, 0);
    panel.text.textContent =
      `Called normal are ${above(normal)} of the normal and ${above(noisy(normal, other))} of the ` +
      `noisy points. The centre, where no normal point lies, scores ${minus(centre.toFixed(1))}: ` +
      `${centre > 0 ? "normal" : "anomalous"}.`;
    panel.root.dataset.trained = centre;
  }

  function draw(c, wide, height) {
    const side = Math.min(wide - 56, height - 72);
    const box = { left: (wide - side) / 2, top: 24, width: side, height: side };
    const values = Array.from({ length: GRID + 1 }, (_, row) =>
      Array.from({ length: GRID + 1 }, (_, column) => network.score(where(column), where(row))),
    );
    const field = document.createElement("canvas");
    field.width = field.height = GRID + 1;
    const pixels = new ImageData(GRID + 1, GRID + 1);
    const [normal, defect] = ["normal", "defect"].map((name) => rgb(panel.colour(name)));
    values.flat().forEach((value, i) => {
      const row = GRID - Math.floor(i / (GRID + 1)); // the plane's y points up
      const at = 4 * (row * (GRID + 1) + (i % (GRID + 1)));
      pixels.data.set(value > 0 ? normal : defect, at);
      pixels.data[at + 3] = 150 * Math.min(1, Math.abs(value)) ** 0.7;
    });
    field.getContext("2d").putImageData(pixels, 0, 0);
    c.drawImage(field, box.left, box.top, side, side);

    c.lineWidth = 1;
    const ticks = [-4, -2, 0, 2, 4].map((tick) => [tick, minus(tick)]);
    const range = { from: -REACH, to: REACH, ticks };
    const at = panel.axes(c, box, { ...range, label: "x₁" }, { ...range, label: "x₂" });

    const shown = figures.random(5);
    const points = ring(60, shown);
    const others = noisy(points, shown);
    c.strokeStyle = panel.colour("ground");
    c.save();
    c.beginPath();
    c.rect(box.left, box.top, side, side);
    c.clip();
    for (const [some, colour] of [[points, normal], [others, defect]]) {
      c.fillStyle = `rgb(${colour})`;
      for (const [x, y] of some) {
        c.beginPath();
        if (some === points) c.arc(at.x(x), at.y(y), 4, 0, 2 * Math.PI);
        else c.rect(at.x(x) - 3, at.y(y) - 3, 6, 6);
        c.fill();
        c.stroke();
      }
    }
    c.restore();
    c.strokeStyle = panel.colour("text");
    c.lineWidth = 2.5;
    c.beginPath();
    for (const [[x1, y1], [x2, y2]] of contour(values)) {
      c.moveTo(at.x(x1), at.y(y1));
      c.lineTo(at.x(x2), at.y(y2));
    }
    c.stroke();
  }

  /** Pieces of the line on which the score is zero: marching squares. */
  function contour(values) {
    const pieces = [];
    for (let row = 0; row < GRID; row++)
      for (let column = 0; column < GRID; column++) {
        const corners = [[0, 0], [1, 0], [1, 1], [0, 1]].map(([dx, dy]) => ({
          x: column + dx, y: row + dy, value: values[row + dy][column + dx],
        }));
        const cuts = [];
        corners.forEach((a, i) => {
          const b = corners[(i + 1) % 4];
          if (a.value > 0 === b.value > 0) return;
          const share = a.value / (a.value - b.value);
          cuts.push([where(a.x + share * (b.x - a.x)), where(a.y + share * (b.y - a.y))]);
        });
        for (let i = 0; i + 1 < cuts.length; i += 2) pieces.push([cuts[i], cuts[i + 1]]);
      }
    return pieces;
  }

  function where(index) {
    return -REACH + (2 * REACH * index) / GRID;
  }

  function rgb(hex) {
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  }

  function minus(number) {
    return String(number).replace("-", "−");
  }

  random = figures.random(seed);
  network = new figures.Network(WIDTHS[width.value], random.uniform);
  panel.start({
    caption:
      "A discriminator is trained in your browser at every change: 500 steps of the chapter's loss. " +
      "Dots are normal, squares noisy. On the thick line the score is zero. The picture above stays " +
      "for paper.",
    describe: "The plane with points on a ring, noisy points and the learned boundary; the sentence below has the numbers.",
    height: (wide) => Math.min(wide - 56, 320) + 72,
    draw,
  });
  // Train when it comes into view, and not before.
  new IntersectionObserver((seen, observer) => {
    if (!seen.some((one) => one.isIntersecting)) return;
    observer.disconnect();
    train();
  }).observe(panel.canvas);
};

/** The chapter's discriminator in the plane: Linear, LeakyReLU, Linear without bias; Adam. */
figures.Network = class {
  constructor(width, uniform) {
    this.width = width;
    const from = (inputs) => () => (2 * uniform() - 1) / Math.sqrt(inputs); // as torch's nn.Linear
    // Per hidden unit the two weights and the bias of the first layer, and the second's weight.
    this.weights = Float64Array.from({ length: 4 * width }, (_, i) => from(i % 4 < 3 ? 2 : width)());
    this.first = new Float64Array(4 * width); // Adam's moments
    this.second = new Float64Array(4 * width);
    this.steps = 0;
  }

  score(x, y) {
    const w = this.weights;
    let sum = 0;
    for (let i = 0; i < w.length; i += 4) {
      const hidden = w[i] * x + w[i + 1] * y + w[i + 2];
      sum += w[i + 3] * (hidden > 0 ? hidden : 0.2 * hidden);
    }
    return sum;
  }

  /** One step of Adam on the margin loss, margin 0.5, of normal and noisy points. */
  step(normal, noisy, rate = 0.02) {
    const w = this.weights;
    const gradient = new Float64Array(w.length);
    for (const [points, sign] of [[normal, 1], [noisy, -1]])
      for (const [x, y] of points) {
        if (sign * this.score(x, y) >= 0.5) continue; // far enough: it costs nothing
        const push = -sign / points.length;
        for (let i = 0; i < w.length; i += 4) {
          const hidden = w[i] * x + w[i + 1] * y + w[i + 2];
          const slope = hidden > 0 ? 1 : 0.2;
          const back = push * w[i + 3] * slope;
          gradient[i] += back * x;
          gradient[i + 1] += back * y;
          gradient[i + 2] += back;
          gradient[i + 3] += push * hidden * slope;
        }
      }
    this.steps++;
    const [keep, keepSquare] = [1 - 0.9 ** this.steps, 1 - 0.999 ** this.steps];
    for (let i = 0; i < w.length; i++) {
      this.first[i] = 0.9 * this.first[i] + 0.1 * gradient[i];
      this.second[i] = 0.999 * this.second[i] + 0.001 * gradient[i] ** 2;
      w[i] -= (rate * (this.first[i] / keep)) / (Math.sqrt(this.second[i] / keepSquare) + 1e-8);
    }
  }
};
