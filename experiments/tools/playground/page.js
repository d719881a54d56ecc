"use strict";
// The page: sliders hold the settings, `model` computes, uPlot draws. What is drawn is what `window.syncgap` returns.

(() => {
  const byId = (id) => document.getElementById(id);
  const RANGES = [...document.querySelectorAll("input[type=range]")];
  const CHOICES = ["path", "sampler"];
  const SEED = byId("seed");
  const PLAY_SECONDS = 9;

  // --- settings: the controls hold them, their initial values are the defaults

  const radios = (name) => [...document.querySelectorAll(`input[name=${name}]`)];
  const DEFAULTS = Object.fromEntries([
    ...RANGES.map((input) => [input.id, Number(input.defaultValue)]),
    ...CHOICES.map((name) => [name, radios(name).find((radio) => radio.defaultChecked).value]),
    ["seed", Number(SEED.defaultValue)],
  ]);
  let seed = DEFAULTS.seed; // the last whole number seen in the field, which may be empty while it is edited

  function settings() {
    return Object.fromEntries([
      ...RANGES.map((input) => [input.id, Number(input.value)]),
      ...CHOICES.map((name) => [name, radios(name).find((radio) => radio.checked).value]),
      ["seed", seed],
    ]);
  }

  /** Moves controls; what is not a value of a control is left out, and ranges keep to their steps and ends. */
  function set(values) {
    for (const input of RANGES) {
      const value = values[input.id];
      if (value !== undefined && value !== "" && Number.isFinite(Number(value))) input.value = value;
    }
    for (const name of CHOICES) {
      const radio = radios(name).find(({ value }) => value === values[name]);
      if (radio) radio.checked = true;
    }
    if (/^\d{1,6}$/.test(values.seed)) SEED.value = seed = Number(values.seed);
    changed();
  }

  // --- the address of the page: what differs from the defaults

  function hashOf(now) {
    const entries = Object.entries(now).filter(([name, value]) => value !== DEFAULTS[name]);
    return new URLSearchParams(entries).toString();
  }

  const fromHash = () => set({ ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) });

  let writing = 0;
  function writeHash() {
    clearTimeout(writing); // browsers refuse an address that changes with every move of a slider
    writing = setTimeout(() => {
      const hash = hashOf(settings());
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    }, 250);
  }

  // --- numbers and colours

  const minus = (text) => text.replace("-", "−");
  function fixed(value, digits = 2) {
    if (!Number.isFinite(value)) return "–";
    return minus(value.toFixed(digits)).replace(/^−(0\.?0*)$/, "$1"); // no minus zero
  }
  const short = (value) => minus(String(Number(value.toPrecision(4))));
  const OUTPUT = {
    g: (v) => (v > 0 ? "+" : "") + fixed(v),
    m2: (v) => fixed(v, 1),
    s2: fixed,
    progress: (v) => `${short(100 * v)} %`,
    gate: (v) => fixed(v, 3),
    exponent: (v) => fixed(v, 1),
  };

  const colors = {};
  function readColors() {
    const style = getComputedStyle(document.documentElement);
    const names = "paper panel ink quiet line grid common difference third replica-a replica-b";
    for (const name of names.split(" ")) {
      colors[name] = style.getPropertyValue(`--${name}`).trim();
    }
    colors.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  }

  // viridis, whose order is seen with any colour vision; without the end that vanishes in the paper
  const VIRIDIS = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];
  function bandColor(band, count) {
    const [low, high] = colors.dark ? [2, 7] : [0, 5.6];
    const at = low + (band / (count - 1)) * (high - low), i = Math.min(Math.floor(at), 6), share = at - i;
    const part = (k, c) => parseInt(VIRIDIS[k].slice(c, c + 2), 16);
    const channel = (c) => Math.round((1 - share) * part(i, c) + share * part(i + 1, c));
    return `rgb(${channel(1)}, ${channel(3)}, ${channel(5)})`;
  }

  // --- marks on top of curves

  const ratio = () => window.devicePixelRatio || 1;

  function pen(plot, color, dash = []) {
    const { ctx } = plot;
    ctx.strokeStyle = ctx.fillStyle = color;
    ctx.lineWidth = 1.4 * ratio();
    ctx.setLineDash(dash.map((length) => length * ratio()));
    return ctx;
  }

  const place = (plot, x, y) => [plot.valToPos(x, "x", true), plot.valToPos(y, "y", true)];

  function segment(plot, from, to, color, dash) {
    const ctx = pen(plot, color, dash);
    ctx.beginPath();
    ctx.moveTo(...place(plot, ...from));
    ctx.lineTo(...place(plot, ...to));
    ctx.stroke();
  }

  function vertical(plot, x, color, dash = [4, 4]) {
    if (Number.isFinite(x)) segment(plot, [x, plot.scales.y.min], [x, plot.scales.y.max], color, dash);
  }

  function dot(plot, x, y, color, radius = 4.5) {
    if (!Number.isFinite(y)) return;
    const ctx = pen(plot, color);
    ctx.beginPath();
    ctx.arc(...place(plot, x, y), radius * ratio(), 0, 2 * Math.PI);
    ctx.fill();
    ctx.strokeStyle = colors.paper;
    ctx.stroke();
  }

  function triangle(plot, x, color) {
    const ctx = pen(plot, color), size = 6 * ratio(), [px, py] = place(plot, x, plot.scales.y.min);
    ctx.beginPath();
    ctx.moveTo(px, py - 1.7 * size);
    ctx.lineTo(px - size, py);
    ctx.lineTo(px + size, py);
    ctx.fill();
  }

  function note(plot, text, x, y, color, align = "center") {
    const ctx = pen(plot, color);
    ctx.font = `${12 * ratio()}px system-ui, sans-serif`;
    ctx.textAlign = align;
    ctx.textBaseline = "bottom";
    ctx.lineWidth = 4 * ratio();
    ctx.strokeStyle = colors.panel;
    ctx.strokeText(text, ...place(plot, x, y));
    ctx.fillText(text, ...place(plot, x, y));
  }

  // --- charts: what each shows of the numbers, and where it looks

  const ends = (...lists) => {
    const values = lists.flat().filter(Number.isFinite);
    return [Math.min(...values), Math.max(...values)];
  };
  const padded = ([low, high], share = 0.06) => [low - share * (high - low), high + share * (high - low)];
  const upwards = (...lists) => [0, 1.08 * Math.max(ends(...lists)[1], 1e-9)];
  const symmetric = (...lists) => {
    const reach = 1.08 * Math.max(...ends(...lists).map(Math.abs));
    return [-reach, reach];
  };
  const backwards = (list) => [...list].reverse(); // uPlot wants x to increase; times of generation fall
  const gaps = (list) => list.map((value) => (Number.isFinite(value) ? value : null));
  const line = (label, color, more = {}) => ({ label, color, width: 2, ...more });

  /** A well opens at 0: its curve starts at the last time at which there is none. */
  const opened = (list, sign) => list.map((x, k) => (x > 0 || list[k + 1] > 0 || list[k - 1] > 0 ? sign * x : null));

  const CHARTS = {
    potential: {
      height: 210,
      xLabel: "state x",
      xName: "x",
      uses: ({ potential }) => [potential],
      data: ({ potential: p }) => [p.x, p.common, p.difference],
      series: () => [line("common", colors.common), line("difference", colors.difference)],
      y: ({ potential: p }) => {
        const bottom = Math.min(...p.depth);
        return [bottom - 0.35, bottom + 6];
      },
      marks(plot, { potential: p }) {
        [colors.common, colors.difference].forEach((color, mode) => {
          for (const side of p.branch[mode] > 0 ? [-1, 1] : [0]) dot(plot, side * p.branch[mode], p.depth[mode], color);
        });
      },
    },
    coupling: {
      height: 210,
      xLabel: "OU coupling g",
      xName: "g",
      uses: ({ coupling, potential }, now) => [coupling, potential.t, now.g],
      data: ({ coupling: c }) => [c.g, c.common, c.difference, c.gap],
      series: () => [
        line("common", colors.common), line("difference", colors.difference),
        line("gap", colors.third, { dash: [7, 4] }),
      ],
      y: ({ coupling: c }) => padded(ends(c.common, c.difference, c.gap, [-0.1, 0.1])),
      marks(plot, { speciation: s, potential: { t } }, { g }) {
        segment(plot, [plot.scales.x.min, t], [plot.scales.x.max, t], colors.quiet, [1, 3]);
        vertical(plot, g, colors.quiet);
        dot(plot, g, s.common, colors.common);
        dot(plot, g, s.difference, colors.difference);
        dot(plot, g, s.gap, colors.third);
      },
    },
    replicas: {
      height: 200,
      xLabel: "time t",
      xName: "t",
      fall: true,
      uses: ({ pair, potential }) => [pair, potential.t],
      data: ({ pair: p }) => [p.t, p.a, p.b].map(backwards),
      series: () => [
        line("replica A", colors["replica-a"], { width: 1.6 }), line("replica B", colors["replica-b"], { width: 1.6 }),
      ],
      y: ({ pair: p }) => symmetric(p.a, p.b),
      marks: splits,
    },
    modes: {
      height: 200,
      xLabel: "time t",
      xName: "t",
      fall: true,
      uses: ({ pair, potential }) => [pair, potential.t],
      data({ pair: p }) {
        const wells = [p.wells.common, p.wells.difference].flatMap((well) => [opened(well, 1), opened(well, -1)]);
        return [p.t, p.common, p.difference, ...wells].map(backwards);
      },
      series() {
        const well = (color) => line("well", color, { dash: [4, 4], width: 1.4, class: "unnamed" });
        return [
          line("common", colors.common, { width: 1.6 }), line("difference", colors.difference, { width: 1.6 }),
          well(colors.common), well(colors.common), well(colors.difference), well(colors.difference),
        ];
      },
      y: ({ pair: p }) => symmetric(p.common, p.difference, p.wells.common, p.wells.difference),
      marks: splits,
    },
    squares: {
      height: 200,
      xLabel: "time t",
      xName: "t",
      fall: true,
      uses: ({ pair, potential }) => [pair, potential.t],
      data: ({ pair: { ensemble: e } }) => [e.t, e.common.theory, e.difference.theory].map(backwards),
      series: () => [line("common", colors.common), line("difference", colors.difference)],
      y: ({ pair: { ensemble: e } }) =>
        upwards(e.common.theory, e.difference.theory, e.common.mean.map((m, k) => m + 2 * e.common.error[k])),
      marks(plot, numbers) {
        const { ensemble: e } = numbers.pair;
        vertical(plot, numbers.potential.t, colors.quiet);
        for (const mode of ["common", "difference"]) {
          const { mean, error } = e[mode];
          for (let k = 0; k < e.t.length; k += 10) {
            segment(plot, [e.t[k], mean[k] - 2 * error[k]], [e.t[k], mean[k] + 2 * error[k]], colors[mode]);
            dot(plot, e.t[k], mean[k], colors[mode], 3.2);
          }
        }
      },
    },
    bands: {
      height: 280,
      table: true, // below the chart, in place of a legend
      xLabel: "log-SNR, nats (noise recedes to the right)",
      xName: "log-SNR",
      uses: ({ bands }) => [bands],
      data: ({ bands: b }) => [b.ell, ...b.latched],
      series: ({ bands: b }) => b.latched.map((_, k) => line(`band ${k + 1}`, bandColor(k, b.latched.length))),
      y: () => [0, 1.06],
      marks(plot, { bands: b }) {
        const count = b.tau.length;
        const [from, to] = [b.tau[0], b.tau[count - 1]];
        segment(plot, [b.ell[0], b.share], [b.ell[b.ell.length - 1], b.share], colors.quiet, [2, 4]);
        note(plot, "w(ρ), many steps", b.ell[0] + 0.3, b.share, colors.quiet, "left");
        if (!Number.isFinite(from)) return;
        segment(plot, [from, 0.14], [to, 0.14], colors.ink);
        segment(plot, [from, 0.11], [from, 0.17], colors.ink);
        segment(plot, [to, 0.11], [to, 0.17], colors.ink);
        note(plot, `gap ${fixed(b.gap)}`, (from + to) / 2, 0.155, colors.ink);
        b.tau.forEach((tau, k) => triangle(plot, tau, bandColor(k, count)));
      },
    },
    gaps: {
      height: 175,
      xLabel: "attention gate",
      xName: "gate",
      uses: ({ gates, bands }) => [gates, bands],
      data: ({ gates: c }) => [c.gate, gaps(c.gap), gaps(c.gapLatched)],
      series: () => [line("timing gap", colors.common), line("latched gap", colors.difference)],
      y: ({ gates: c }) => padded(ends(c.gap, c.gapLatched, [0, 0.5])),
      marks(plot, { bands: b }, { gate }) {
        vertical(plot, gate, colors.quiet);
        dot(plot, gate, b.gap, colors.common);
        dot(plot, gate, b.gapLatched, colors.difference);
      },
    },
    shares: {
      height: 175,
      xLabel: "attention gate",
      xName: "gate",
      uses: ({ gates, bands }) => [gates, bands],
      data: ({ gates: c }) => [c.gate, c.decidedLow, c.decidedHigh, c.share],
      series({ bands: b }) {
        const count = b.tau.length;
        return [
          line("lowest band", bandColor(0, count)), line("highest band", bandColor(count - 1, count)),
          line("w(ρ), many steps", colors.quiet, { dash: [2, 4] }),
        ];
      },
      y: () => [0, 1.06],
      marks(plot, { bands: b }, { gate }) {
        const count = b.tau.length;
        vertical(plot, gate, colors.quiet);
        dot(plot, gate, b.decided[0], bandColor(0, count));
        dot(plot, gate, b.decided[count - 1], bandColor(count - 1, count));
      },
    },
  };

  function splits(plot, { speciation: s, potential: { t } }) {
    vertical(plot, t, colors.quiet);
    vertical(plot, s.common || NaN, colors.common, [1, 3]);
    vertical(plot, s.difference || NaN, colors.difference, [1, 3]);
  }

  // --- drawing

  let shown, at; // numbers and settings that are on the screen
  const drawn = {}; // plot, what it was drawn from, and how many curves it has, for every chart

  function mark(plot, chart) {
    plot.ctx.save();
    chart.marks(plot, shown, at);
    plot.ctx.restore();
  }

  function options(name, chart) {
    const box = byId(`chart-${name}`);
    const axis = (more) => ({
      stroke: colors.quiet, font: "12px system-ui, sans-serif",
      grid: { stroke: colors.grid, width: 1 }, ticks: { stroke: colors.line, width: 1, size: 5 },
      values: (_, ticks) => ticks.map((value) => (value === null ? "" : short(value))),
      ...more,
    });
    const value = (_, y) => (y === null || y === undefined ? "" : fixed(y));
    const points = { show: false };
    const markerDash = (_, k) => (chart.series(shown)[k - 1]?.dash ? "dashed" : "solid");
    const below = { label: chart.xLabel, labelSize: 22, labelGap: 2, labelFont: "12px system-ui, sans-serif" };
    return {
      width: box.clientWidth, height: chart.height, padding: [8, 12, 0, 0],
      cursor: { drag: { x: false, y: false }, points: { size: 6 } },
      legend: { show: !chart.table, markers: { width: 2, dash: markerDash } },
      scales: {
        x: { time: false, dir: chart.fall ? -1 : 1, range: (_, low, high) => [low, high] },
        y: { range: () => chart.y(shown) },
      },
      axes: [axis({ ...below, size: 30, space: 55 }), axis({ size: 42, space: 26 })],
      series: [
        { label: chart.xName, value },
        ...chart.series(shown).map(({ color, ...rest }) => ({ value, stroke: color, points, ...rest })),
      ],
      hooks: { draw: [(plot) => mark(plot, chart)] },
    };
  }

  function draw(name) {
    const chart = CHARTS[name], uses = chart.uses(shown, at), curves = chart.series(shown).length;
    const before = drawn[name];
    if (before && before.curves === curves && uses.every((part, i) => part === before.uses[i])) return;
    if (before && before.curves !== curves) before.plot.destroy();
    const plot = before?.curves === curves
      ? before.plot
      : new uPlot(options(name, chart), chart.data(shown), byId(`chart-${name}`));
    if (before?.plot === plot) plot.setData(chart.data(shown));
    drawn[name] = { plot, uses, curves };
  }

  function redrawAll() {
    readColors();
    for (const name of Object.keys(drawn)) {
      drawn[name].plot.destroy();
      delete drawn[name];
    }
    render();
  }

  // --- words and numbers

  /** Replaces what an element shows by "name value" entries, in the ink of a curve or in the page's. */
  function numbers(id, ...entries) {
    byId(id).replaceChildren(...entries.map(([name, value, curve]) => {
      const span = document.createElement("span"), bold = document.createElement("b");
      bold.textContent = value;
      if (curve) span.style.color = `var(--${curve}-ink)`;
      span.append(name ? `${name} ` : "", bold);
      return span;
    }));
  }

  const time = (t) => (t > 0 ? fixed(t, 3) : "never");
  const wells = (kappa) => (kappa > 1 ? "2 wells" : "1 well");

  function describe() {
    const { speciation: s, potential: p, pair, bands: b, gates: c } = shown;
    numbers("numbers-potential",
      ["t =", fixed(p.t, 3)],
      ["κᵤ =", `${fixed(p.kappa[0])} (${wells(p.kappa[0])})`, "common"],
      ["κᵥ =", `${fixed(p.kappa[1])} (${wells(p.kappa[1])})`, "difference"]);
    numbers("numbers-coupling",
      ["tᵤ =", time(s.common), "common"], ["tᵥ =", time(s.difference), "difference"],
      ["gap Δt =", fixed(s.gap, 3), "third"]);
    const end = (path) => fixed(path[path.length - 1]);
    numbers("numbers-pair",
      ["this pair ends at u =", end(pair.common), "common"], ["v =", end(pair.difference), "difference"],
      ["replica A at", end(pair.a), "replica-a"],
      ["replica B at", end(pair.b), "replica-b"]);
    const none = !Number.isFinite(b.gap);
    numbers("numbers-bands",
      ["ρ =", fixed((1 - at.gate) / (1 + at.gate), 3)], ["w(ρ) =", fixed(b.share, 3)],
      ["", none ? "nothing decided" : `${at.steps} steps`]);
    numbers("numbers-gates",
      ["timing gap", none ? "none" : `${fixed(b.gap)} nats, ${fixed(b.gapSteps, 1)} steps`, "common"],
      ["latched", `${fixed(b.gapLatched)} nats`, "difference"]);
    const rows = b.tau.map((tau, k) => {
      const row = document.createElement("tr");
      row.style.setProperty("--swatch", bandColor(k, b.tau.length));
      const variance = short(Number(b.variance[k].toPrecision(3)));
      const cells = [k + 1, variance, fixed(tau), fixed(b.tauStep[k], 1), fixed(b.decided[k], 3)];
      row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return row;
    });
    byId("table-bands").tBodies[0].replaceChildren(...rows);
    describeCharts(c);
  }

  /** For readers of the screen: the charts in words. */
  function describeCharts(c) {
    const { speciation: s, potential: p, bands: b } = shown;
    const words = {
      potential: `Potential at t ${fixed(p.t)}: common mode ${wells(p.kappa[0])}, difference ${wells(p.kappa[1])}.`,
      coupling: `Times of the split against g; here ${time(s.common)} and ${time(s.difference)}, gap ${fixed(s.gap)}.`,
      replicas: "Both replicas of one pair from noise to data.",
      modes: "Common and difference mode of the pair, with the positions of the wells.",
      squares: "Mean squares of both modes over 200 simulated pairs, on the exact curves.",
      bands: `Share decided against log-SNR for ${b.tau.length} bands; gap ${fixed(b.gap)} nats.`,
      gaps: `Timing and latched gap against the gate, from ${fixed(c.gap[0])} nats without it.`,
      shares: `Decided share of the lowest and the highest band against the gate; here ${fixed(b.decided[0])}.`,
    };
    for (const [name, text] of Object.entries(words)) byId(`chart-${name}`).setAttribute("aria-label", text);
  }

  function render() {
    at = settings();
    shown = model.evaluate(at);
    for (const input of RANGES) {
      const text = (OUTPUT[input.id] ?? String)(Number(input.value));
      document.querySelector(`output[for=${input.id}]`).textContent = text;
      input.setAttribute("aria-valuetext", text);
    }
    describe();
    for (const name of Object.keys(CHARTS)) draw(name);
  }

  let waiting = 0;
  function changed() {
    if (!waiting) {
      waiting = requestAnimationFrame(() => {
        waiting = 0;
        render();
      });
    }
    writeHash();
  }

  // --- the animation

  const PROGRESS = byId("progress"), PLAY = byId("play");
  let frame = 0;

  function pause() {
    cancelAnimationFrame(frame);
    frame = 0;
    PLAY.textContent = "▶ Play";
  }

  function play() {
    const from = Number(PROGRESS.value) < 1 ? Number(PROGRESS.value) : 0;
    let start;
    const advance = (now) => {
      start ??= now;
      PROGRESS.value = from + (now - start) / (1000 * PLAY_SECONDS);
      changed();
      if (Number(PROGRESS.value) < 1) frame = requestAnimationFrame(advance);
      else pause();
    };
    PLAY.textContent = "❚❚ Pause";
    frame = requestAnimationFrame(advance);
  }

  function reset() {
    pause();
    set(DEFAULTS);
  }

  // --- events

  for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("input", ({ target }) => {
    if (target === SEED) {
      if (SEED.value === "" || !SEED.checkValidity()) return;
      seed = SEED.valueAsNumber;
    }
    if (target === PROGRESS) pause();
    changed();
  });
  SEED.addEventListener("change", () => (SEED.value = seed));
  byId("again").addEventListener("click", () => set({ seed: (seed + 1) % 1000000 }));
  byId("reset").addEventListener("click", reset);
  PLAY.addEventListener("click", () => (frame ? pause() : play()));
  addEventListener("hashchange", fromHash);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);

  // --- go

  for (const name of Object.keys(CHARTS)) {
    const box = byId(`chart-${name}`);
    box.setAttribute("role", "img");
    new ResizeObserver(() => {
      const plot = drawn[name]?.plot;
      if (plot && plot.width !== box.clientWidth) plot.setSize({ width: box.clientWidth, height: CHARTS[name].height });
    }).observe(box);
  }
  readColors();
  for (const form of document.forms) form.reset(); // some browsers restore what was entered before a reload
  fromHash();
  render();

  window.syncgap = {
    defaults: DEFAULTS,
    settings,
    set,
    reset,
    /** What is on the screen. */
    shown: () => shown,
    /** All numbers at any settings, also between the steps of the sliders; defaults where nothing is said. */
    evaluate: (some = {}) => model.evaluate({ ...DEFAULTS, ...some }),
    /** Mean squares of simulated pairs, their standard errors, and the exact ones. */
    ensemble(some, count) {
      const full = { ...DEFAULTS, ...some };
      return model.meanSquares(full, model.simulate(full, count));
    },
    simulate: (some, count) => model.simulate({ ...DEFAULTS, ...some }, count),
  };
})();
