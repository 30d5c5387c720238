// k of n held-out photos, the false alarm rate that is promised, and the one you may get.
(window.figures ??= {}).promise = (panel) => {
  const { percent, betaQuantile, betaDensity } = figures;
  const change = () => {
    k.input.max = n.value;
    k.value = Math.min(k.value, n.value);
    answer();
    panel.draw();
  };
  const n = panel.slider("Held-out photos n", { min: 1, max: 200, value: 60, change });
  const k = panel.slider("Threshold’s rank k", { min: 1, max: 60, value: 3, change });

  function answer() {
    const [a, b] = [k.value, n.value + 1 - k.value];
    const [low, high] = [0.05, 0.95].map((q) => betaQuantile(q, a, b));
    panel.text.textContent =
      `On average ${k.value}/${n.value + 1} = ${percent(k.value / (n.value + 1))} of normal photos are ` +
      `called anomalous. That is the promise. In 90 of 100 choices of the photos the rate lies ` +
      `between ${percent(low)} and ${percent(high)}.`;
  }

  function draw(c, width, height) {
    const [a, b] = [k.value, n.value + 1 - k.value];
    const mean = a / (a + b);
    const [low, high] = [0.05, 0.95].map((q) => betaQuantile(q, a, b));
    // The narrowest round axis that holds nearly all of it.
    const reach = betaQuantile(0.995, a, b);
    const to = [0.05, 0.1, 0.2, 0.5, 1].find((end) => end >= reach) ?? 1;
    const density = Array.from({ length: 301 }, (_, i) => {
      const x = Math.min(Math.max((i / 300) * to, 1e-6), 1 - 1e-6);
      return [x, betaDensity(x, a, b)];
    });
    const top = Math.max(...density.map(([, y]) => y)) * 1.15;
    const box = { left: 16, top: 24, width: width - 36, height: height - 72 };
    const ticks = [0, 1, 2, 3, 4, 5].map((i) => [(i * to) / 5, `${+(i * to * 20).toFixed(1)}%`]);
    const x = { from: 0, to, ticks, label: "false alarm rate you get" };
    const at = panel.axes(c, box, x, { from: 0, to: top, label: "how likely" });

    const area = (points) => {
      c.beginPath();
      c.moveTo(at.x(points[0][0]), at.y(0));
      for (const [px, py] of points) c.lineTo(at.x(px), at.y(py));
      c.lineTo(at.x(points.at(-1)[0]), at.y(0));
      c.fill();
    };
    c.fillStyle = panel.colour("normal");
    c.globalAlpha = 0.25;
    area(density);
    c.globalAlpha = 0.6;
    const middle = density.filter(([px]) => px > low && px < high);
    area([low, ...middle.map(([px]) => px), high].map((px) => [px, betaDensity(Math.min(px, 1 - 1e-6), a, b)]));
    c.globalAlpha = 1;

    c.strokeStyle = c.fillStyle = panel.colour("text");
    c.setLineDash([5, 4]);
    c.lineWidth = 2;
    c.beginPath();
    c.moveTo(at.x(mean), at.y(0));
    c.lineTo(at.x(mean), box.top);
    c.stroke();
    c.setLineDash([]);
    const right = at.x(mean) < width - 130;
    c.textAlign = right ? "left" : "right";
    c.textBaseline = "top";
    c.fillText(`promise ${percent(mean)}`, at.x(mean) + (right ? 6 : -6), box.top + 5);
  }

  panel.start({
    caption:
      "Choose how many photos set the threshold, and which of their scores it is: the k-th highest. " +
      "Dark: the middle 90%. The picture above stays for paper.",
    describe: "Distribution of the false alarm rate; the sentence below has its numbers.",
    height: 240,
    draw,
  });
  answer();
};
