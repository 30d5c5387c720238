// A threshold over the scores of 60 nuts: ROC point, table of verdicts, precision at a base rate.
(window.figures ??= {}).verdict = (panel) => {
  const { percent } = figures;
  // "one head" of results/nuts/scoreboard.json; tests/test_figures.py compares.
  const NORMAL = [
    -0.3802, -0.1042, -0.1004, -0.0838, -0.0325, 0.0091, 0.0194, 0.0525, 0.0796, 0.1495, 0.16,
    0.1628, 0.226, 0.2732, 0.335, 0.3677, 0.3804, 0.406, 0.5012, 1.2474,
  ];
  const DEFECT = [
    0.6442, 0.6816, 0.7532, 1.4434, 1.4611, 1.7531, 1.8973, 1.9356, 1.9421, 2.1896, 2.4776, 2.9152,
    2.9819, 3.3915, 3.5896, 3.7592, 4.0862, 4.1067, 5.4523, 5.5097, 5.5774, 6.0396, 6.8902, 7.9367,
    8.378, 8.3994, 8.553, 9.0879, 9.1117, 9.2489, 9.2596, 9.8877, 9.9551, 10.2556, 10.4738, 11.3607,
    12.2831, 13.3965, 14.5006, 21.5255,
  ];
  figures.SCORES = { normal: NORMAL, defect: DEFECT };
  const RATES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5];
  // Low scores are close together, so the slider and the axis are logarithmic in the score + 1.5.
  const place = (score) => Math.log(score + 1.5);
  const score = (at) => Math.round(100 * (Math.exp(at) - 1.5)) / 100;
  const [FROM, TO] = [place(-0.5), place(25)];
  let strip; // where the scores lie on the canvas

  const change = () => {
    answer();
    panel.draw();
  };
  const threshold = panel.slider("Threshold", {
    min: FROM, max: TO, step: (TO - FROM) / 400, value: place(1), change,
    show: (at) => score(at).toFixed(2),
  });
  const rate = panel.slider("Base rate of defects", {
    min: 0, max: RATES.length - 1, value: RATES.indexOf(0.01), change,
    show: (index) => percent(RATES[index]),
  });

  const table = document.createElement("table");
  table.innerHTML =
    "<thead><tr><td></td><th scope=col>called anomalous</th><th scope=col>called normal</th></tr></thead>" +
    "<tbody><tr><th scope=row>40 with a defect</th><td></td><td></td></tr>" +
    "<tr><th scope=row>20 normal</th><td></td><td></td></tr></tbody>";
  table.className = "answer-table";
  panel.controls.after(table);

  const count = () => {
    const above = (scores) => scores.filter((one) => one > score(threshold.value)).length;
    return [above(DEFECT), above(NORMAL)];
  };

  function answer() {
    const [found, alarms] = count();
    const [tpr, fpr, base] = [found / DEFECT.length, alarms / NORMAL.length, RATES[rate.value]];
    const cells = [found, DEFECT.length - found, alarms, NORMAL.length - alarms];
    table.querySelectorAll("tbody td").forEach((cell, i) => (cell.textContent = cells[i]));
    const precision = (rate) => (base * tpr) / (base * tpr + (1 - base) * rate);
    const words = [`True positive rate ${percent(tpr)}, false positive rate ${percent(fpr)}.`];
    if (found + alarms === 0) words.push("No alarm at all, so there is no precision.");
    else {
      words.push(`If ${percent(base)} of the parts have a defect, precision is ${percent(precision(fpr))}.`);
      // Clopper and Pearson, as in the chapter.
      const most = alarms < NORMAL.length ? figures.betaQuantile(0.975, alarms + 1, NORMAL.length - alarms) : 1;
      if (most < 1)
        words.push(
          `With only 20 normal images the true rate of false positives may be as high as ` +
            `${percent(most)}; then precision is ${percent(precision(most))}.`,
        );
    }
    panel.text.textContent = words.join(" ");
  }

  function draw(c, width, height) {
    const wide = width > 560;
    const side = wide ? 200 : 170;
    const dots = { left: 16, top: 22, width: wide ? width - side - 110 : width - 36, height: wide ? side : 110 };
    const roc = wide
      ? { left: width - side - 20, top: 22, width: side, height: side }
      : { left: (width - side) / 2 + 10, top: 216, width: side, height: side };
    const ticks = [0, 1, 2, 5, 10, 20].map((one) => [place(one), one]);
    strip = dots;
    const at = panel.axes(
      c, dots,
      { from: FROM, to: TO, ticks, label: "image score" },
      { from: 0, to: 2, label: "60 test images" },
    );
    const edge = at.x(threshold.value);
    for (const [scores, colour, row, name] of [
      [DEFECT, "defect", 1.45, "defect"],
      [NORMAL, "normal", 0.45, "normal"],
    ]) {
      c.fillStyle = c.strokeStyle = panel.colour(colour);
      scores.forEach((one, i) => {
        c.beginPath();
        const [x, y] = [at.x(place(one)), at.y(row + 0.3 * (((i * 7) % 5) / 4 - 0.5))];
        // Normal images are dots, defects squares: not by colour alone.
        if (colour === "normal") c.arc(x, y, 4.5, 0, 2 * Math.PI);
        else c.rect(x - 4, y - 4, 8, 8);
        c.globalAlpha = 0.75;
        c.fill();
        c.globalAlpha = 1;
      });
      c.fillStyle = panel.colour("text");
      c.textAlign = colour === "normal" ? "right" : "left";
      c.textBaseline = "middle";
      const corner = colour === "normal" ? dots.left + dots.width - 8 : dots.left + 8;
      c.fillText(name, corner, at.y(row));
    }
    c.strokeStyle = c.fillStyle = panel.colour("text");
    c.lineWidth = 2;
    c.beginPath();
    c.moveTo(edge, dots.top);
    c.lineTo(edge, dots.top + dots.height);
    c.stroke();
    c.beginPath(); // a handle
    c.arc(edge, dots.top + dots.height / 2, 7, 0, 2 * Math.PI);
    c.fill();

    c.lineWidth = 1;
    const shares = [0, 0.5, 1];
    const on = panel.axes(
      c, roc,
      { from: 0, to: 1, ticks: shares, label: "false positive rate" },
      { from: 0, to: 1, ticks: shares, label: "true positive rate" },
    );
    c.strokeStyle = panel.colour("defect");
    c.lineWidth = 2.5;
    c.beginPath();
    c.moveTo(on.x(0), on.y(0));
    let [found, alarms] = [0, 0];
    const all = [...DEFECT.map((one) => [one, 1]), ...NORMAL.map((one) => [one, 0])];
    for (const [, label] of all.sort((a, b) => b[0] - a[0])) {
      if (label) found++;
      else alarms++;
      c.lineTo(on.x(alarms / NORMAL.length), on.y(found / DEFECT.length));
    }
    c.stroke();
    [found, alarms] = count();
    c.fillStyle = panel.colour("text");
    c.strokeStyle = panel.colour("ground");
    c.beginPath();
    c.arc(on.x(alarms / NORMAL.length), on.y(found / DEFECT.length), 7, 0, 2 * Math.PI);
    c.fill();
    c.stroke();
  }

  // A finger or the mouse drags the line itself.
  panel.canvas.classList.add("answer-drag");
  const drag = (event) => {
    const share = (event.offsetX - strip.left) / strip.width;
    threshold.value = FROM + Math.min(1, Math.max(0, share)) * (TO - FROM);
    change();
  };
  panel.canvas.addEventListener("pointerdown", (event) => {
    const inside = event.offsetX < strip.left + strip.width + 10 && event.offsetY < strip.top + strip.height + 10;
    if (!inside) return;
    panel.canvas.setPointerCapture(event.pointerId);
    drag(event);
  });
  panel.canvas.addEventListener("pointermove", (event) => {
    if (panel.canvas.hasPointerCapture(event.pointerId)) drag(event);
  });

  panel.start({
    caption:
      "Drag the line, or move the slider: what lies to its right is called anomalous. The scores are " +
      "those of one head in the scoreboard. The picture above stays for paper.",
    describe: "Scores of 60 images with a threshold, and the ROC curve; sentence and table below have the numbers.",
    height: (width) => (width > 560 ? 270 : 440),
    draw,
  });
  answer();
};
