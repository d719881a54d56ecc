"use strict";
// The theory behind the page: pure functions of the settings, in doubles, no document. It says what ou_theory says, and
// is tested against it; section numbers are those of docs/theory.md.

const model = (() => {
  const MODES = ["common", "difference"];
  const OWN_RATE = 1; // b of both replicas; the strength of the noise is 1, too
  const TRAIN_STEPS = 1000, BETA_MIN = 1e-4, BETA_MAX = 0.02;
  const PATH_POINTS = 160; // steps of a drawn path
  const ENSEMBLE = 200; // pairs behind the mean squares

  const linspace = (low, high, count) =>
    Array.from({ length: count }, (_, i) => (i === count - 1 ? high : low + i * ((high - low) / (count - 1))));
  const last = (values) => values[values.length - 1];

  // --- one mode of the coupled Ornstein-Uhlenbeck process (sections 2 and 4.3)

  /** Rates of the common and the difference mode under coupling g. */
  const rates = (g) => [OWN_RATE - g, OWN_RATE + g];

  /** Noise pulled back to the data, (exp(2 rate t) - 1) / rate. */
  const modeNoise = (rate, t) => (rate === 0 ? 2 * t : Math.expm1(2 * rate * t) / rate);

  /** Variance gathered by the state, (1 - exp(-2 rate t)) / rate. */
  const modeVariance = (rate, t) => modeNoise(-rate, t);

  /** Time at which the pulled-back noise reaches a spread; 0 if that is not positive, infinite if it never does. */
  function transitionTime(rate, spread) {
    if (spread <= 0) return 0;
    if (rate === 0) return spread / 2;
    return rate * spread > -1 ? Math.log1p(rate * spread) / (2 * rate) : Infinity;
  }

  /** Where the clusters of a mode are at time t, and their variance. */
  function clusters(s, rate, t) {
    const factor = Math.exp(-rate * t);
    return { mu: factor * Math.sqrt(s.m2), variance: factor * factor * s.s2 + modeVariance(rate, t) };
  }

  // --- speciation

  /** Times at which the modes speciate, common minus difference, and how far back the page looks. */
  function speciation(s) {
    const [common, difference] = rates(s.g).map((rate) => transitionTime(rate, s.m2 - s.s2));
    const horizon = Math.max(1.5, 1.35 * Math.max(common, difference));
    return { common, difference, gap: common - difference, horizon };
  }

  /** OU time of the slider: from the horizon (noise) down to 0 (data). */
  const timeOf = (s) => speciation(s).horizon * (1 - s.progress);

  /** m^2 / (s^2 + N) of both modes: a mode has two wells where it exceeds 1. */
  const kappas = (s, t) => rates(s.g).map((rate) => s.m2 / (s.s2 + modeNoise(rate, t)));

  // x coth x - 1 = x^2/3 - x^4/45 + ..., in powers of x^2
  const COTH = [1 / 3, -1 / 45, 2 / 945, -1 / 4725, 2 / 93555, -1382 / 638512875, 4 / 18243225];

  /** x coth x - 1 and its derivative in x^2, at x^2 = square > 0. */
  function cothExcess(square) {
    if (square < 0.1) {
      let value = 0, slope = 0;
      for (let i = COTH.length - 1; i >= 0; i--) {
        value = value * square + COTH[i];
        slope = slope * square + (i + 1) * COTH[i];
      }
      return [value * square, slope];
    }
    const x = Math.sqrt(square), coth = 1 / Math.tanh(x);
    return [x * coth - 1, (coth + x * (1 - coth * coth)) / (2 * x)];
  }

  /** The largest solution of M = tanh(kappa M): Newton's method for x = kappa M in x^2, where x coth x is concave. */
  function magnetisation(kappa) {
    if (!(kappa > 1)) return 0;
    const bounded = Math.min(kappa, 1e3);
    let square = (bounded * Math.tanh(Math.sqrt(3 * (bounded - 1)))) ** 2;
    for (let i = 0; i < 6; i++) {
      const [value, slope] = cothExcess(square);
      square += (bounded - 1 - value) / slope;
    }
    return Math.tanh(Math.sqrt(square));
  }

  /** Position of the right-hand well of a mode, 0 while there is one well only. */
  function well(s, rate, t) {
    const { mu, variance } = clusters(s, rate, t);
    return mu * magnetisation((mu * mu) / variance);
  }

  /** -log p of a mode at x, normalised. */
  function negativeLogDensity({ mu, variance }, x) {
    const z = Math.abs((mu * x) / variance);
    const logCosh = z + Math.log1p(Math.exp(-2 * z)) - Math.LN2;
    return (x * x + mu * mu) / (2 * variance) - logCosh + 0.5 * Math.log(2 * Math.PI * variance);
  }

  /** -log p of both modes at the time of the slider, over a range that holds the clusters at every time. */
  function potential(s) {
    const t = timeOf(s);
    const reach = Math.max(2.5, 1.1 * (Math.sqrt(s.m2) + 3 * Math.sqrt(s.s2)));
    const x = linspace(-reach, reach, 241);
    const [common, difference] = rates(s.g).map((rate) => {
      const law = clusters(s, rate, t);
      return x.map((at) => negativeLogDensity(law, at));
    });
    const branch = rates(s.g).map((rate) => well(s, rate, t));
    const depth = rates(s.g).map((rate, mode) => negativeLogDensity(clusters(s, rate, t), branch[mode]));
    return { t, kappa: kappas(s, t), branch, depth, x, common, difference };
  }

  /** Speciation times and their gap against the coupling. */
  function coupling(s) {
    const g = linspace(-0.95, 0.95, 191);
    const found = g.map((value) => speciation({ ...s, g: value }));
    return {
      g,
      common: found.map((one) => one.common),
      difference: found.map((one) => one.difference),
      gap: found.map((one) => one.gap),
    };
  }

  // --- the sampler's clock (section 2)

  /** Half to even, as Python rounds. */
  function roundHalfEven(value) {
    const floor = Math.floor(value), rest = value - floor;
    if (rest !== 0.5) return rest < 0.5 ? floor : floor + 1;
    return floor % 2 === 0 ? floor : floor + 1;
  }

  /** Indices that a sampler of so many steps keeps: a float stride, accumulated as the official sampler does. */
  function respace(count) {
    const stride = count > 1 ? (TRAIN_STEPS - 1) / (count - 1) : 1;
    const kept = [];
    for (let i = 0, position = 0; i < count; i++, position += stride) kept.push(roundHalfEven(position));
    return [...new Set(kept)];
  }

  const ALPHA_BAR = (() => {
    let product = 1;
    const step = (BETA_MAX - BETA_MIN) / (TRAIN_STEPS - 1);
    return Array.from({ length: TRAIN_STEPS }, (_, i) => {
      product *= 1 - (i === TRAIN_STEPS - 1 ? BETA_MAX : i * step + BETA_MIN);
      return product;
    });
  })();

  /** Levels that a sampler visits, noise first. */
  function clock(count) {
    const alphaBar = respace(count).map((i) => ALPHA_BAR[i]).reverse();
    return {
      start: 1 / alphaBar[0], // variance of the first state in the rescaled frame
      sigma: alphaBar.map((a) => Math.sqrt((1 - a) / a)),
      ell: alphaBar.map((a) => Math.log(a) - Math.log1p(-a)),
    };
  }

  /** Real-valued sampler step of a level: 0 below the first one, the number of steps ("never") above the last. */
  function stepOf(level, ell) {
    if (Number.isNaN(level)) return NaN;
    if (level > last(ell)) return ell.length;
    if (level <= ell[0]) return 0;
    const next = ell.findIndex((value) => value >= level);
    return next - 1 + (level - ell[next - 1]) / (ell[next] - ell[next - 1]);
  }

  // --- what a band decides (sections 5 and 7)

  /** Gain that the difference mode keeps under a gate. */
  const rho = (gate) => (1 - gate) / (1 + gate);

  /** Variances S_k = S_1 k^-a. */
  const powerLaw = (s) => Array.from({ length: s.bands }, (_, i) => s.s1 * (i + 1) ** -s.exponent);

  /** Energy of the denoised difference at every step of the sampler, exactly (5.11). */
  function recursion(variance, gain, { sigma, start }, eta) {
    const energy = [];
    let v = start;
    for (let k = 0; k < sigma.length; k++) {
      const noise = sigma[k] * sigma[k], total = (gain * variance) / (variance + noise);
      energy.push(total * total * v);
      if (k + 1 === sigma.length) break;
      const ratio = sigma[k + 1] / sigma[k], fresh = eta * eta * (1 - ratio * ratio);
      const factor = total + (1 - total) * ratio * Math.sqrt(1 - fresh);
      v = factor * factor * v + sigma[k + 1] * sigma[k + 1] * fresh;
    }
    return energy;
  }

  /** Running maximum of the relative energy, at most 1; how much is decided, when, and both in one level. */
  function commitment(energy, reference, ell) {
    let highest = 0, area = 0;
    const latched = energy.map((value) => (highest = Math.max(highest, Math.min(1, value / reference))));
    for (let k = 1; k < ell.length; k++) area += ((ell[k] - ell[k - 1]) * (latched[k] + latched[k - 1])) / 2;
    const decided = last(latched);
    return { latched, decided, tau: decided > 0 ? last(ell) - area / decided : NaN, level: last(ell) - area };
  }

  const etaOf = (s) => (s.sampler === "ancestral" ? 1 : 0);

  /** Estimates of one band at each gate of a list. */
  function bandAt(variance, gates, steps, eta) {
    const reference = last(recursion(variance, 1, steps, eta));
    return gates.map((gate) => commitment(recursion(variance, rho(gate), steps, eta), reference, steps.ell));
  }

  /** Every band under the gate of the slider. */
  function bands(s) {
    const steps = clock(s.steps), variance = powerLaw(s);
    const found = variance.map((value) => bandAt(value, [s.gate], steps, etaOf(s))[0]);
    const tau = found.map((one) => one.tau), level = found.map((one) => one.level);
    const tauStep = tau.map((value) => stepOf(value, steps.ell));
    return {
      ell: steps.ell, variance, tau, tauStep, level,
      latched: found.map((one) => one.latched),
      decided: found.map((one) => one.decided),
      gap: last(tau) - tau[0],
      gapSteps: last(tauStep) - tauStep[0],
      gapLatched: last(level) - level[0],
      share: shareEverDecided(rho(s.gate), etaOf(s)),
    };
  }

  /** Share of a mode that is ever decided individually, in the limit of many steps (5.7). */
  function shareEverDecided(gain, eta) {
    const rest = 1 - gain;
    if (rest === 0) return 1;
    if (eta === 0) return gain * gain * Math.exp(rest * Math.log(rest) - (1 + rest) * Math.log1p(rest));
    const b = 2 * gain - 1;
    const slope = Math.abs(b) < 1e-8 ? -1 - b / 2 : Math.log1p(-b) / b;
    return gain * gain * Math.exp(2 * rest * slope);
  }

  /** Gaps and shares of the lowest and the highest band against the gate; close together where w falls steeply. */
  function gates(s) {
    const gate = Array.from({ length: 51 }, (_, i) => (i / 50) ** 2);
    const steps = clock(s.steps), variance = powerLaw(s);
    const low = bandAt(variance[0], gate, steps, etaOf(s)), high = bandAt(last(variance), gate, steps, etaOf(s));
    return {
      gate,
      gap: gate.map((_, i) => high[i].tau - low[i].tau),
      gapLatched: gate.map((_, i) => high[i].level - low[i].level),
      decidedLow: low.map((one) => one.decided),
      decidedHigh: high.map((one) => one.decided),
      share: gate.map((value) => shareEverDecided(rho(value), etaOf(s))),
    };
  }

  // --- pairs, backwards in time

  /** Uniform numbers in (0, 1] from a whole number; mulberry32. */
  function generator(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let z = Math.imul(state ^ (state >>> 15), state | 1);
      z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
      return 1 - ((z ^ (z >>> 14)) >>> 0) / 4294967296;
    };
  }

  /** Two independent unit Gaussians; Box and Muller. */
  function gaussians(uniform) {
    const radius = Math.sqrt(-2 * Math.log(uniform())), angle = 2 * Math.PI * uniform();
    return [radius * Math.cos(angle), radius * Math.sin(angle)];
  }

  /** Times of a path, noise first, close together near the data. */
  const pathTimes = (s) => {
    const { horizon } = speciation(s);
    return Array.from({ length: PATH_POINTS + 1 }, (_, k) => horizon * (1 - k / PATH_POINTS) ** 2);
  };

  /** Laws of a mode at all times of a path, and what is needed between them. */
  function pathLaws(s, rate, times) {
    const laws = times.map((t) => clusters(s, rate, t));
    return laws.map((law, k) => {
      if (k === 0) return law;
      const before = laws[k - 1], step = times[k - 1] - times[k];
      const factor = Math.exp(-rate * step);
      return {
        ...law, before, rate, step,
        middle: clusters(s, rate, times[k] + step / 2),
        pull: (factor * law.variance) / before.variance,
        spread: Math.sqrt((law.variance * modeVariance(rate, step)) / before.variance),
      };
    });
  }

  /** One step of the reverse SDE, drawn from its exact law: a side, and given that a Gaussian. */
  function stochasticStep(law, x, uniform, z) {
    const right = 1 / (1 + Math.exp((-2 * law.before.mu * x) / law.before.variance));
    const side = uniform <= right ? 1 : -1;
    return side * law.mu + law.pull * (x - side * law.before.mu) + law.spread * z;
  }

  /** One step of the probability flow dx = (rate x + score) dt backwards in time; Runge and Kutta, fourth order. */
  function flowStep(law, x) {
    const velocity = ({ mu, variance }, at) => law.rate * at + (mu * Math.tanh((mu * at) / variance) - at) / variance;
    const h = law.step;
    const k1 = velocity(law.before, x), k2 = velocity(law.middle, x + (h / 2) * k1);
    const k3 = velocity(law.middle, x + (h / 2) * k2), k4 = velocity(law, x + h * k3);
    return x + (h / 6) * (k1 + 2 * k2 + 2 * k3 + k4);
  }

  /**
   * Paths of independent pairs from noise to data: {t, common, difference}, each mode a list of paths. The random
   * numbers depend on the seed alone, so that a path moves with the sliders.
   */
  function simulate(s, count) {
    const t = pathTimes(s), uniform = generator(s.seed), flow = s.path === "flow";
    const laws = rates(s.g).map((rate) => pathLaws(s, rate, t));
    const paths = { t, common: [], difference: [] };
    for (let pair = 0; pair < count; pair++) {
      const both = MODES.map(() => new Array(t.length));
      for (let k = 0; k < t.length; k++) {
        if (k > 0 && flow) {
          both.forEach((x, mode) => (x[k] = flowStep(laws[mode][k], x[k - 1])));
          continue;
        }
        const z = gaussians(uniform);
        both.forEach((x, mode) => {
          const law = laws[mode][k], u = uniform();
          x[k] = k > 0
            ? stochasticStep(law, x[k - 1], u, z[mode])
            : (u <= 0.5 ? law.mu : -law.mu) + Math.sqrt(law.variance) * z[mode];
        });
      }
      MODES.forEach((name, mode) => paths[name].push(both[mode]));
    }
    return paths;
  }

  /** Mean squares of both modes over simulated pairs, their standard errors, and the exact ones. */
  function meanSquares(s, { t, common, difference }) {
    const result = { t };
    [common, difference].forEach((paths, mode) => {
      const mean = [], error = [], theory = [];
      t.forEach((time, k) => {
        let sum = 0, squares = 0;
        for (const path of paths) {
          sum += path[k] ** 2;
          squares += path[k] ** 4;
        }
        const average = sum / paths.length;
        mean.push(average);
        error.push(Math.sqrt(Math.max(0, squares / paths.length - average ** 2) / (paths.length - 1)));
        const { mu, variance } = clusters(s, rates(s.g)[mode], time);
        theory.push(mu * mu + variance);
      });
      result[MODES[mode]] = { mean, error, theory };
    });
    return result;
  }

  /** The pair that is drawn, first of an ensemble: its modes, its replicas, the wells it moves between. */
  function pair(s) {
    const paths = simulate(s, ENSEMBLE);
    const common = paths.common[0], difference = paths.difference[0];
    const wells = rates(s.g).map((rate) => paths.t.map((t) => well(s, rate, t)));
    return {
      t: paths.t, common, difference,
      a: common.map((u, k) => (u + difference[k]) * Math.SQRT1_2),
      b: common.map((u, k) => (u - difference[k]) * Math.SQRT1_2),
      wells: { common: wells[0], difference: wells[1] },
      ensemble: meanSquares(s, paths),
    };
  }

  // --- everything

  // parts of the page, and the settings that each depends on: a part is computed anew only when one of them changes
  const CLUSTERS = ["g", "m2", "s2"], SAMPLER = ["bands", "exponent", "s1", "sampler", "steps"];
  const PARTS = {
    speciation: [speciation, CLUSTERS],
    potential: [potential, [...CLUSTERS, "progress"]],
    coupling: [coupling, ["m2", "s2"]],
    bands: [bands, [...SAMPLER, "gate"]],
    gates: [gates, SAMPLER],
    pair: [pair, [...CLUSTERS, "path", "seed"]],
  };

  const kept = {};

  /** All that the page shows at these settings; parts that did not change are the same objects as before. */
  function evaluate(settings) {
    const result = {};
    for (const [name, [part, depends]] of Object.entries(PARTS)) {
      const key = depends.map((setting) => settings[setting]).join(" ");
      if (kept[name]?.key !== key) kept[name] = { key, value: part(settings) };
      result[name] = kept[name].value;
    }
    return result;
  }

  return { evaluate, simulate, meanSquares, magnetisation, clock };
})();
