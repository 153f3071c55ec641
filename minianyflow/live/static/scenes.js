// The scenes that compute in the page: from the values of the controls to what the player shows.
//
// A scene is made once from the page's data; `draw(state)` is a generator, since a page answers at once and goes on after:
// it yields { panels, note, axis }, first with FIRST particles, then with all and their measures.
import * as math from "./compute.js";
import * as learning from "./learn.js"; // WORKER: the text of a worker that has it
import * as video from "./video.js";

const FIRST = 96, CURVE = 256, EXACT = 32, FINE = 64; // particles of a first picture and of the curve; steps of exact paths; the grid of the triangle
const STEPS = [1, 2, 4, 8, 16, 32, 64, 128];
const ahead = (steps, label = "t", digits = 2) => ({ label, digits, from: steps[0], to: steps.at(-1), stops: steps });
const fixed = (value, digits = 3) => value.toFixed(digits).replace(/^0\./, ".");

/** Trajectories of all noises (T n 2), computed some rows at a time; one row again when its noise is moved. */
class Paths {
  constructor(noise, times, solve) {
    Object.assign(this, { noise, times, solve, count: noise.length / 2, done: 0 });
    this.values = new Float32Array(times.length * noise.length);
    this.shape = [times.length, this.count, 2];
    this.scale = 1;
  }
  rows(begin, end) {
    this.solve(this.noise.slice(2 * begin, 2 * end), end - begin, begin).forEach((state, k) => this.values.set(state, 2 * (k * this.count + begin)));
  }
  extend(end) {
    if (end > this.done) this.rows(this.done, end), (this.done = end);
    return this;
  }
  end(count = this.done) {
    return this.values.subarray(this.values.length - 2 * this.count, this.values.length - 2 * (this.count - count));
  }
}

/** What the scenes on the plane share: targets, students, noises, and the trajectories made so far. */
export class World {
  constructor({ data, particles, labels, colours }) {
    Object.assign(this, { math, data, particles, labels, colours, held: new Map(), networks: {} });
    this.slow = math.fast || data.graphs ? "" : "WebAssembly is switched off: this page computes more slowly.";
  }
  noise(seed) {
    if (this.seed !== seed) {
      const { directions, shift } = this.data.sobol, D = 2;
      const state = { directions: directions.values.subarray(30 * D * seed, 30 * D * (seed + 1)), shift: shift.values.subarray(D * seed, D * (seed + 1)) };
      this.held.clear();
      this.seed = seed;
      this.z = Float64Array.from(math.sobolNoise(state, this.particles));
    }
    return this.z;
  }
  target(dataset) {
    const target = this.data.targets[dataset];
    target.mixture ??= { means: Float64Array.from(target.means.values), sigma: target.sigma };
    target.along ??= math.projections(target.reference.values);
    return target;
  }
  network(method, dataset) {
    return (this.networks[`${method} ${dataset}`] ??= math.makeNetwork(this.data.students[dataset][method].values, this.data.sizes));
  }
  /** u(z, n, t, r, out) of a method. */
  map(method, dataset) {
    if (method === "euler") return (z, n, t, r, out) => math.velocity(this.target(dataset).mixture, z, n, t, out);
    const network = this.network(method, dataset);
    return (z, n, t, r, out) => math.evaluate(network, z, n, t, r, out);
  }
  /** Trajectories along `times`; solve(z, n, begin) makes them. before: those at whose ends they begin, or null. */
  paths(name, times, solve, before = null) {
    const key = [name, this.seed, times].join("|");
    if (this.held.size > 60) this.held.clear();
    const start = (z, n, begin) => (before ? before.extend(begin + n).end().slice(2 * begin, 2 * (begin + n)) : z);
    if (!this.held.has(key)) this.held.set(key, new Paths(this.z, times, (z, n, begin) => solve(start(z, n, begin), n, begin)));
    return this.held.get(key);
  }
  exact(dataset, times = math.timeGrid(EXACT), before = null) {
    return this.paths(`exact ${dataset}`, times, (z, n) => math.flow(this.target(dataset).mixture, z, n, times), before);
  }
  learned(method, dataset, times, before = null) {
    return this.paths(`${method} ${dataset}`, times, (z, n) => math.rollout(this.map(method, dataset), z, n, times), before);
  }
  /** As sample() of plane/students.py: consistency starts over from torch's own fresh noise. */
  sampled(method, dataset, steps) {
    const times = math.timeGrid(steps), size = 2 * this.particles;
    if (method !== "consistency") return this.learned(method, dataset, times);
    let fresh = null;
    const solve = (z, n, begin) => {
      if (!fresh) {
        const generator = new math.Generator(this.data.fresh[steps][this.seed]);
        fresh = times.slice(2).map(() => generator.randn(size));
      }
      return math.rollout(this.map(method, dataset), z, n, times, fresh.map((eps) => eps.subarray(2 * begin, 2 * (begin + n))));
    };
    return this.paths(`consistency ${dataset}`, times, solve);
  }
  panel(title, colour, paths, exact, { trace = true, measures = {} } = {}) {
    const { values, shape, scale, done, times } = paths, array = (from) => ({ values: from.values, shape: from.shape, scale: 1 });
    const ghosts = { values: exact.end(), shape: [exact.done, 2], scale: 1 };
    const spec = { kind: "plane", title, colour, times, points: { values, shape, scale }, count: done, ghosts, limit: 2.4, trails: 90, followed: [0, 1, 2, 3, 4, 5] };
    return { ...spec, ...(trace ? { exact: array(exact) } : {}), measures };
  }
  /** The class that learns `mixture`, or null: another one is sent away. */
  classOf(key, mixture, methods) {
    if (this.school?.key !== key) this.dismiss();
    return (this.school ??= mixture && new School(key, mixture, methods, this.data.start));
  }
  dismiss() {
    this.school?.dismiss();
    this.school = null;
  }
  learner(task) {
    return new learning.Learner(task);
  }
  /** Move noise i: its row of every shown trajectory is computed again, all others are forgotten. */
  drag(i, place, shown) {
    this.z.set(place, 2 * i);
    for (const [key, paths] of this.held)
      if (!shown.has(paths)) this.held.delete(key);
      else if (paths.done > i) paths.rows(i, i + 1);
  }
}

const evaluations = (count) => ({ evaluations: String(count) });
const AGAIN = { "path error": "…", "sliced W2": "…", "its floor": "…" };

function* race(world, { steps, dataset, flow_map, seed }) {
  world.noise(seed);
  const target = world.target(dataset), { colours, labels } = world, exact = world.exact(dataset), methods = ["euler", flow_map, "consistency"];
  const paths = [exact, ...methods.map((method) => world.sampled(method, dataset, steps))], names = ["exact", ...methods];
  const note = "Rings: the same six noises; drag one, or choose it by its digit and move it by the arrow keys. Large dots: where they are. Thick grey: where the exact flow takes them. Grey dots: its ends.";
  const times = math.timeGrid(steps), curves = {};
  const scene = (measures) => ({
    panels: [...paths.map((path, k) => world.panel(labels[names[k]], colours[names[k]], path, exact, { trace: k > 0, measures: { ...measures(k), ...evaluations(k ? steps : exact.evaluations ?? "…") } })), curve()],
    note, paths, drag: true, hides: true, axis: ahead(steps > 8 ? times : math.timeGrid(32)),
  });
  const curve = () => {
    const lines = methods.map((method) => ({ colour: colours[method], label: labels[method].split(",")[0], places: curves[method] ?? [] }));
    return { kind: "curve", title: "path error against steps", measures: { band: `its scatter, ${CURVE} noises` }, aspect: 1, lines, at: steps, steps: STEPS, limits: [0.003, 4], ticks: [0.01, 0.1, 1] };
  };
  for (const end of [FIRST, ...Array.from({ length: Math.ceil(world.particles / 128) }, (_, k) => Math.min(world.particles, 128 * (k + 1)))]) {
    if (paths.every(({ done }) => done >= end)) continue;
    for (const path of paths) path.extend(end);
    exact.evaluations = math.solves(exact.times);
    if (end === FIRST) yield scene(() => AGAIN);
    else yield null;
  }
  exact.evaluations = math.solves(exact.times);
  const measures = [];
  for (const [k, path] of paths.entries()) {
    const floor = names[k] === "consistency" && steps > 1 ? target.floors.fresh : names[k] === "exact" ? target.floors.data : null;
    measures.push({ "path error": fixed(math.pathError(path.end(), exact.end())), "sliced W2": fixed(math.slicedW2(path.end(), target.along)) });
    measures[k]["its floor"] = floor ? `${fixed(floor[0])} ± ${fixed(floor[1])}` : measures[0]["sliced W2"];
    if (k + 1 < paths.length) yield null;
  }
  const { held } = world;
  for (const method of methods) curves[method] = held.get(`curve ${method} ${dataset} ${seed}`);
  yield scene((k) => measures[k]);
  for (const method of methods) {
    if (curves[method]) continue;
    const places = [];
    for (const count of STEPS) {
      const ends = [world.sampled(method, dataset, count).extend(CURVE), exact].map((paths) => paths.end(CURVE));
      places.push([count, math.pathError(...ends), math.scatter(...ends)]);
      yield null;
    }
    held.set(`curve ${method} ${dataset} ${seed}`, (curves[method] = places));
    yield scene((k) => measures[k]);
  }
}

/** A falling chain of times on the grid, as even as possible; fewer jumps where there is no room for all. */
function spread(start, target, jumps) {
  const first = Math.round(FINE * start), last = Math.round(FINE * target), count = Math.min(jumps, Math.max(1, first - last));
  return Array.from({ length: count + 1 }, (_, k) => Math.round(first + ((last - first) * k) / count) / FINE);
}

function* triangle(world, state) {
  const { jumps, method, dataset, seed } = state, chain = state.chain ?? spread(state.start, state.target, jumps), [from, to] = [chain[0], chain.at(-1)];
  if (!(from > to)) throw new Error(`from t = ${from} to r = ${to}: choose \`to r\` below \`from t\``);
  world.noise(seed);
  const fine = Array.from({ length: EXACT + 1 }, (_, k) => from + ((to - from) * k) / EXACT), before = from < 1 ? world.exact(dataset, [1, from]) : null;
  const learned = world.learned(method, dataset, chain, before), exact = world.exact(dataset, fine, before);
  for (const end of [FIRST, world.particles]) {
    learned.extend(end), exact.extend(end);
    const colour = world.colours[method], title = method === "euler" ? "Euler, exact velocity" : world.labels[method];
    const error = { "path error": fixed(math.pathError(learned.end(), exact.end())) };
    yield {
      panels: [
        { kind: "triangle", snap: FINE, drag: true, title: "drag the dots", colour, chain, measures: chain.length < 6 ? { times: chain.map((time) => time.toFixed(2)).join(" > ") } : { jumps: String(chain.length - 1) } },
        world.panel(title, colour, learned, exact, { measures: { ...error, ...evaluations(chain.length - 1) } }),
        world.panel("exact flow", world.colours.exact, exact, exact, { trace: false, measures: { "path error": ".000", ...evaluations(math.solves(fine)) } }),
      ],
      note: "Both begin at the exact states at t. Large dots: the same six particles. Thick grey: where the exact flow takes them. Grey dots: its ends.",
      axis: ahead([from, ...fine.slice(1)]), paths: [learned, exact], drag: from === 1, hides: true,
    };
  }
}

/** The norm of the on-policy gradient through each jump: the real score is exact, the fake one the student's. */
export function gradients(network, mixture, z, times, generator) {
  const n = z.length / 2, kept = [], path = math.rollout((state, n, t, r, out) => (kept.push([]), math.evaluate(network, state, n, t, r, out, 2, kept.at(-1))), z, n, times);
  const x = path.at(-1), t = generator.rand(n), eps = generator.randn(2 * n), state = x.map((value, i) => (1 - t[i >> 1]) * value + t[i >> 1] * eps[i]);
  const fake = math.evaluate(network, state, n, t, t, new Float64Array(2 * n)), real = new Float64Array(2 * n);
  math.velocity(mixture, state, n, t, real);
  let d = new Float64Array(2 * n);
  for (let i = 0; i < 2 * n; i += 2) {
    const time = t[i >> 1], away = [0, 1].map((k) => Math.abs(x[i + k] - (state[i + k] - time * real[i + k]))), size = Math.max(1e-6, (away[0] + away[1]) / 2);
    for (const k of [0, 1]) d[i + k] = (time * (real[i + k] - fake[i + k])) / size / n;
  }
  const norms = [];
  for (let k = times.length - 2; k >= 0; k--) {
    const grads = new Float64Array(network.flat.length), length = times[k] - times[k + 1];
    const back = math.backward(network, kept[k], n, d.map((value) => -length * value), grads);
    d = d.map((value, i) => value + back[i]);
    norms.unshift(Math.hypot(...grads));
  }
  return norms;
}

function* backwardSimulation(world, { steps, g, method, dataset, seed }) {
  const z = world.noise(seed), step = Math.min(g, steps - 1), all = math.timeGrid(steps), times = math.simulationTimes(steps, step), jumps = `${times.length - 1} jumps`;
  const exact = world.exact(dataset), whole = world.learned(method, dataset, all), few = world.learned(method, dataset, times), colour = world.colours[method];
  const dots = all.slice(1).map((r, k) => [all[k], r]), bars = { kind: "chart", title: "gradient through each jump", xlabel: "t", times: [1, 0.5, 0], aspect: 1, ticks: [0], limits: [0, 1], bars: [], measures: { "largest jump's share": "…" } };
  const scene = () => ({
    panels: [
      { kind: "triangle", snap: FINE, title: `N = ${steps}, g = ${step}`, colour, chain: times, dots, measures: { grey: `the ${steps} steps`, coloured: `the ${jumps}` } },
      ...[[`all ${steps} steps`, "#777777", whole], [jumps, colour, few]].map(([title, colour, paths]) =>
        world.panel(title, colour, paths, exact, { measures: { "path error": fixed(math.pathError(paths.end(), exact.end())), ...evaluations(paths.times.length - 1) } })),
      bars,
    ],
    note: `Bars: the on-policy gradient (its norm) that reaches the weights through each evaluation; 128 samples. Grey: all ${steps} steps. Coloured: the ${jumps}. Thick grey: the exact flow.`,
    axis: ahead(math.timeGrid(32)), paths: [exact, whole, few], drag: true, hides: true,
  });
  for (const end of [FIRST, world.particles]) {
    for (const paths of [exact, whole, few]) paths.extend(end), end > FIRST && (yield null);
    if (end === FIRST) yield scene();
  }
  const network = world.network(method, dataset), few128 = z.slice(0, 256);
  const norms = [["#444444", all], [`${colour}55`, times]].map(([shade, grid]) => [shade, grid, gradients(network, world.target(dataset).mixture, few128, grid, new math.Generator(world.data.gradient[seed]))]);
  bars.bars = norms.flatMap(([colour, grid, heights]) => heights.map((height, k) => ({ from: grid[k], to: grid[k + 1], height, colour })));
  const top = Math.max(...bars.bars.map(({ height }) => height)), last = norms[1][2];
  bars.ticks = [0, Number((0.55 * top).toPrecision(1)), Number(top.toPrecision(1))];
  bars.limits = [0, Math.max(1.1 * top, bars.ticks[2])];
  bars.measures = { "largest jump's share": `${Math.round((100 * Math.max(...last)) / last.reduce((a, b) => a + b))}%` };
  yield scene();
}

/** Clips (n F 2) of a causal student, frame by frame: after its own frames, or after those of `truth`.
 *  turned: it sees everything turned so that the last frame lies on the first axis, as `CausalMLP` does. */
export function clips(network, z, n, frames, window, times, truth = null, turned = false) {
  const made = new Float64Array(n * frames * 2), past = truth ?? made, D = 2 + 3 * window, turn = (x, y, c, s, to, at) => ((to[at] = x * c - y * s), (to[at + 1] = x * s + y * c));
  for (let frame = 0; frame < frames; frame++) {
    const rows = new Float64Array(n * D), noise = new Float64Array(2 * n), c = new Float64Array(n).fill(1), s = new Float64Array(n);
    for (let row = 0; row < n; row++) {
      const here = 2 * (row * frames + frame), size = turned && frame ? Math.hypot(past[here - 2], past[here - 1]) : 0;
      if (size > 1e-3) (c[row] = past[here - 2] / size), (s[row] = past[here - 1] / size);
      noise.set(z.subarray(here, here + 2), 2 * row);
      for (let k = Math.max(0, window - frame); k < window; k++) {
        const from = here + 2 * (k - window);
        turn(past[from], past[from + 1], c[row], -s[row], rows, row * D + 2 + 2 * k), (rows[row * D + 2 + 2 * window + k] = 1);
      }
    }
    const u = (state, n, t, r, out) => {
      for (let row = 0; row < n; row++) turn(state[2 * row], state[2 * row + 1], c[row], -s[row], rows, row * D);
      math.evaluate(network, rows, n, t, r, out, 2);
      for (let row = 0; turned && row < n; row++) turn(out[2 * row], out[2 * row + 1], c[row], s[row], out, 2 * row);
    };
    math.rollout(u, noise, n, times).at(-1).forEach((value, i) => (made[2 * ((i >> 1) * frames + frame) + (i & 1)] = value));
  }
  return made;
}

/** As fit_speed of circle_measures.py, of the frames [begin, end) of a clip: the nearest speed, and what is left over. */
function fitSpeed(clip, begin, end, speeds) {
  let speed = 0, size = -1, squares = end - begin;
  for (let k = 2 * begin; k < 2 * end; k++) squares += clip[k] ** 2;
  speeds.forEach((turn, index) => {
    let real = 0, imaginary = 0;
    for (let k = begin; k < end; k++) {
      const [x, y, c, s] = [clip[2 * k], clip[2 * k + 1], Math.cos(turn * (k - begin)), Math.sin(turn * (k - begin))];
      (real += x * c + y * s), (imaginary += y * c - x * s);
    }
    const found = Math.hypot(real, imaginary);
    if (found > size) (size = found), (speed = index);
  });
  return { speed, left: squares - 2 * size };
}

/** Two students on their own for many more frames than they were trained on, and beside each how many clips run at which speed. */
function* endless(world, { steps, copy, seed, left, right }) {
  const { data, particles: n, colours } = world, { long: frames, frames: window, speeds } = data, times = [...Array(frames).keys()], shown = [];
  const z = (world.held.get(`long ${seed}`) ?? world.held.set(`long ${seed}`, new math.Generator(data.fresh[seed]).randn(2 * n * frames)).get(`long ${seed}`));
  for (const arm of [left, right]) {
    const network = (world.networks[`${arm} ${copy}`] ??= math.makeNetwork(data.students[arm][copy].values, data.sizes)), key = [arm, copy, steps, "long", seed].join("|");
    const made = world.held.get(key) ?? new Float64Array(z.length), part = 2 * frames * (n / 8);
    for (let at = 0; at < made.length && !world.held.has(key); at += part, yield null)
      made.set(clips(network, z.subarray(at, at + part), n / 8, frames, data.window, math.timeGrid(steps), null, arm === data.turned), at);
    world.held.set(key, made);
    const laws = times.map(() => new Float64Array(speeds.length)), first = [];
    let kept = 0, whole = 0;
    for (let row = 0; row < n; row++) {
      const clip = made.subarray(2 * frames * row, 2 * frames * (row + 1));
      for (const frame of times) {
        const { speed, left } = fitSpeed(clip, Math.max(0, frame + 1 - window), frame + 1, speeds);
        laws[frame][speed] += 1 / n;
        if (frame === window - 1) first[row] = speed;
        if (frame === frames - 1) (kept += (speed === first[row]) / n), (whole += (left <= data.lawful) / n);
      }
    }
    const tv = laws.at(-1).reduce((sum, share) => sum + Math.abs(share - 1 / speeds.length) / 2, 0);
    const points = { values: Float32Array.from({ length: made.length }, (_, i) => made[2 * ((((i >> 1) % n) * frames) + ((i >> 1) / n | 0)) + (i & 1)]), shape: [frames, n, 2], scale: 1 };
    const bars = [...laws].map((law) => [...law].map((height, k) => ({ from: speeds[k] - 0.08, to: speeds[k] + 0.08, height, colour: colours[arm] })));
    shown.push([
      { kind: "plane", title: arm, colour: colours[arm], times, points, limit: 1.6, trails: 0, ring: 1, followed: [0, 1, 2] },
      { kind: "chart", title: "its speeds: share of clips", xlabel: "radians a frame", span: [-0.75, 0.75], times: [-0.6, -0.2, 0.2, 0.6], limits: [0, 1], ticks: [0, 0.17, 0.5, 1], history: bars, aspect: 0.8,
        measures: { "tv: speeds, distance from even": fixed(tv, 2), "kept: still at its first speed": fixed(kept, 2), "whole: last 16 frames lawful": fixed(whole, 2) } },
    ]);
  }
  const note = "Every frame is made after its own frames, ten times as many as in training. Bars: the speeds of the last 16 frames; of data .17 each.";
  yield { panels: shown.flat(), note, axis: ahead(times, "frame", 0), duration: 12000, hides: true };
}

function* exposure(world, state) {
  if (state.context === "long") return yield* endless(world, state);
  const { context, steps, copy, seed } = state, { data, particles: n, colours } = world, { frames, window, lost } = data, size = 2 * n * frames, held = (key, make) => (world.held.has(key) || world.held.set(key, make()), world.held.get(key));
  const z = held(`noise ${seed}`, () => {
    const D = 2 * frames, { directions, shift } = data.sobol;
    return Float64Array.from(math.sobolNoise({ directions: directions.values.subarray(30 * D * seed, 30 * D * (seed + 1)), shift: shift.values.subarray(D * seed, D * (seed + 1)) }, n));
  });
  const truth = Float64Array.from(data.truth.values.subarray(size * seed, size * (seed + 1))), contexts = [context, ...["own", "true"].filter((other) => other !== context)];
  const errors = (made) => {
    const mean = new Float64Array(frames);
    let gone = 0;
    for (let i = 0; i < n * frames; i++) {
      const error = Math.abs(Math.hypot(made[2 * i], made[2 * i + 1]) - 1);
      mean[i % frames] += error / n;
      gone += i % frames === frames - 1 && error > lost;
    }
    return { mean, gone: gone / n };
  };
  const byFrame = (made) => {
    const values = new Float32Array(size);
    for (let i = 0; i < n; i++) for (let k = 0; k < frames; k++) values.set(made.subarray(2 * (i * frames + k), 2 * (i * frames + k) + 2), 2 * (k * n + i));
    return { values, shape: [frames, n, 2], scale: 1 };
  };
  const line = (mean, colour, dash, label) => ({ points: { values: mean, scale: 1 }, times: [...mean.keys()], colour, dash, label }), known = {}, data_line = line(errors(truth).mean, "#000000", [2, 4], "data");
  for (const mode of contexts) {
    for (const arm of [state.left, state.right]) {
      const network = (world.networks[`${arm} ${copy}`] ??= math.makeNetwork(data.students[arm][copy].values, data.sizes));
      const made = held([arm, copy, steps, mode, seed].join("|"), () => clips(network, z, n, frames, window, math.timeGrid(steps), mode === "true" ? truth : null, arm === data.turned));
      known[`${arm} ${mode}`] = { made, ...errors(made) };
      if (arm !== state.right) yield null;
    }
    const rings = [state.left, state.right].map((arm) => {
      const shown = known[`${arm} ${context}`], after = known[`${arm} true`], last = shown.mean.at(-1);
      const measures = { "radius error, last frame": fixed(last), "over that after true frames": after ? (last / after.mean.at(-1)).toFixed(2) : "…", "clips lost": `${Math.round(100 * shown.gone)}%`, "evaluations a clip": String(steps * frames) };
      return { kind: "plane", title: arm, colour: colours[arm], times: [...Array(frames).keys()], points: byFrame(shown.made), limit: 1.6, trails: 0, ring: 1, followed: [0, 1, 2], measures, ...(context === "true" ? { exact: byFrame(truth) } : {}) };
    });
    const lines = [state.left, state.right].flatMap((arm) => [["own", []], ["true", [7, 5]]].filter(([mode]) => known[`${arm} ${mode}`]).map(([mode, dash]) => line(known[`${arm} ${mode}`].mean, colours[arm], dash, `${arm}, ${mode}`)));
    const chart = { kind: "chart", title: "radius error", xlabel: "frame", times: [0, 5, 10, 15], log: true, limits: [0.025, 0.8], ticks: [0.03, 0.1, 0.3], lines: [...lines, data_line], aspect: 1 };
    const note = `Every frame is made after ${context === "true" ? "true frames" : "its own frames"}. Large dots: three clips, the same noise left and right.${context === "true" ? " Thick grey: the true clips." : ""}`;
    yield { panels: [...rings, chart], note, axis: ahead([...Array(frames).keys()], "frame", 0), duration: 6000, hides: true };
  }
}

/** Networks that learn one target, each in a worker of its own; in the page, slice by slice, where there are no workers. */
class School {
  constructor(key, mixture, methods, seed) {
    Object.assign(this, { key, pupils: methods.map((method) => this.pupil({ mixture, method, seed })), paused: false, open: true });
    this.look = () => document.hidden || this.pupils.forEach((pupil) => pupil.waits && pupil.ask());
    document.addEventListener("visibilitychange", this.look);
  }
  pupil(task) {
    const pupil = { method: task.method, network: null, steps: 0, history: [], waits: false }, slice = 120; // milliseconds
    const alone = () => {
      const learner = new learning.Learner(task);
      pupil.ask = () => setTimeout(() => this.open && receive(learner.run(slice / 4)));
      pupil.ask();
    };
    const receive = (report) => {
      const { weights, steps, seconds } = Object.assign(pupil, report);
      pupil.network = pupil.network ? math.setWeights(pupil.network, weights) : math.makeNetwork(weights, learning.SIZES);
      pupil.fresh = true;
      pupil.waits = document.hidden; // a page in the background rests
      this.paused ||= pupil.waits;
      if (steps < learning.STEPS && !pupil.waits) pupil.ask();
    };
    try {
      const worker = (pupil.worker = new Worker((this.address ??= URL.createObjectURL(new Blob([WORKER])))));
      pupil.ask = () => ((pupil.waits = false), worker.postMessage(slice));
      worker.onmessage = ({ data }) => receive(data);
      worker.onerror = (event) => (event.preventDefault(), worker.terminate(), alone());
      worker.postMessage({ task });
      pupil.ask();
    } catch {
      alone();
    }
    return pupil;
  }
  dismiss() {
    this.open = false;
    for (const { worker } of this.pupils) worker?.terminate();
    URL.revokeObjectURL(this.address);
    document.removeEventListener("visibilitychange", this.look);
  }
}

const turns = (count, place) => [Array.from({ length: count + 1 }, (_, k) => place((2 * Math.PI * k) / count)).flat()];
const TARGETS = { // strokes, as a hand would draw them
  heart: () => turns(60, (a) => [1.7 * Math.sin(a) ** 3, (13 * Math.cos(a) - 5 * Math.cos(2 * a) - 2 * Math.cos(3 * a) - Math.cos(4 * a)) / 9.5]),
  "two rings": () => [...turns(40, (a) => [0.6 * Math.cos(a), 0.6 * Math.sin(a)]), ...turns(60, (a) => [1.7 * Math.cos(a), 1.7 * Math.sin(a)])],
  "figure eight": () => turns(80, (a) => [1.8 * Math.sin(a), 1.1 * Math.sin(2 * a)]),
};

function* draw(world, state) {
  const { steps, learners, target, seed } = state, z = world.noise(seed), n = world.particles, strokes = TARGETS[target]?.() ?? state.strokes ?? [], { colours } = world;
  const key = `${JSON.stringify(strokes)} ${learners}`, methods = learners === "all" ? world.data.learners : [learners], mixture = learning.drawn(strokes);
  if (state.learning !== key || !mixture) world.dismiss();
  const school = state.learning === key ? world.classOf(key, mixture, methods) : null, cores = navigator.hardwareConcurrency ?? 1;
  const pen = { kind: "pen", title: "draw here", limit: 2.4, ghosts: mixture?.means ?? strokes.flat() }, clear = ["Clear", { target: "your own", strokes: [], learning: null }];
  if (!mixture) {
    const count = strokes.flat().length / 2, note = `${count ? "Too little is drawn: a point or a short line" : "Nothing is drawn yet"}; draw a line, or choose a target above.`;
    return yield { panels: [pen], columns: 3, note, axis: ahead([1, 0]), position: 1, buttons: [clear] };
  }
  const fine = math.timeGrid(EXACT), exact = world.paths(`exact ${key}`, fine, (z, n) => math.flow(mixture, z, n, fine)).extend(n), times = math.timeGrid(steps);
  const eps = times.slice(2).map((_, k) => new math.Generator(1 + k + 100 * seed).randn(2 * n)), shown = [];
  const untrained = (world.networks.start ??= math.makeNetwork(world.learner({ mixture, seed: world.data.start }).weights, learning.SIZES));
  const error = (path) => math.pathError(path.end(), exact.end());
  const walk = (network, times, eps = null) => new Paths(z, times, (z, n) => math.rollout((z, n, t, r, out) => math.evaluate(network, z, n, t, r, out), z, n, times, eps)).extend(n);
  const scene = () => {
    for (const [k, method] of methods.entries()) {
      const pupil = school?.pupils[k], network = pupil?.network ?? untrained, path = !shown[k] || pupil?.fresh ? walk(network, times, method === "consistency" && steps > 1 ? eps : null) : null;
      if (!path) continue;
      if (pupil?.fresh) pupil.history.push([pupil.seconds, error(walk(network, [1, 0]))]), (pupil.fresh = false);
      shown[k] = world.panel(method[0].toUpperCase() + method.slice(1), colours[method], path, exact, { measures: { "path error": fixed(error(path)), "updates": String(pupil?.steps ?? 0) } });
    }
    const lines = (school?.pupils ?? []).map(({ method, history }) => ({ points: { values: history.map(([, error]) => error), scale: 1 }, times: history.map(([seconds]) => seconds), colour: colours[method], dash: method === "eulerian" ? [7, 4] : [] }));
    const longest = Math.max(5, ...lines.flatMap(({ times }) => times.at(-1) ?? 0)), chart = { kind: "chart", title: "error of one step", xlabel: "seconds", span: [0, longest], aspect: 1, log: true, limits: [0.02, 2], ticks: [0.03, 0.1, 0.3, 1], times: [0, Math.round(longest / 2), Math.round(longest)], lines, measures: { dashed: "Eulerian" } };
    const shared = cores < methods.length ? ` ${methods.length} methods share ${cores} ${cores > 1 ? "cores" : "core"}: choose one to see it learn faster.` : "";
    const note = school ? `Grey dots: the ends of the exact flow; thick grey: its paths.${shared}${school.paused ? " The page was in the background: learning paused there." : ""}` : "Draw on the left, lift the pen, press Learn. Predict first: which one is recognisable first, and which keeps the large dots' paths with more steps?";
    return { panels: [pen, ...shown, chart], note, axis: ahead(fine), position: 1, buttons: [school?.pupils.every(({ steps }) => steps === learning.STEPS) ? ["Again", { learning: null }] : school ? ["Stop", { learning: null }] : ["Learn", { learning: key }], clear] };
  };
  yield scene();
  while (school?.pupils.some(({ steps, fresh }) => fresh || steps < learning.STEPS)) {
    yield new Promise((done) => setTimeout(done, 200));
    if (school.pupils.some(({ fresh }) => fresh)) yield scene();
  }
}

/** Bouncing balls from the same noise: steps as columns, whole clips above, chunk by chunk below. */
function* clipsByStep(world, { whole, chunks, seed }) {
  const { graphs, networks, codec, noises, fresh, steps } = world.data, noise = new math.Generator(noises[seed]).randn(640);
  const runners = (name) => (world.networks[name] ??= networks[name].graphs.map((graph) => video.makeRunner(graphs[graph], video.weightsOf(networks[name].flat.values, networks[name].order))));
  const [decode] = (world.networks.codec ??= [video.makeRunner(graphs.decode, video.weightsOf(codec.flat.values, codec.order))]);
  const panel = (row, count) => ({ kind: "video", title: `${count} step${count > 1 ? "s" : ""}${row ? " a chunk" : ""}`, clips: { values: new Uint8Array(2 * 17 * 256), shape: [2, 17, 16, 16], scale: 1 / 255 }, measures: { "balls as asked": "…", evaluations: String(row ? 3 * count + 2 : count), "off straight flight": "…" } });
  const rows = [whole, chunks].map((_, row) => steps.map((count) => panel(row, count)));
  const scene = () => ({
    panels: rows.flat(), columns: steps.length, position: 0.5, loop: true, duration: 2200, axis: ahead([...Array(17).keys()], "frame", 0),
    note: "Above whole clips at once, below chunk by chunk, from the same noise. Asked for: one ball, two balls. Balls as asked: the share of frames in which that many are found. Off straight flight: data read .1.",
  });
  yield scene();
  for (const [column, count] of steps.entries())
    for (const [row, name] of [whole, chunks].entries()) {
      const key = [name, count, seed].join("|"), randn = ((source) => (size) => (source ??= new math.Generator(fresh[count])).randn(size))();
      if (!world.held.has(key)) {
        const end = yield* video.sampled(runners(name), networks[name].how, video.tensorOf(noise, [2, 5, 4, 4, 4]), math.timeGrid(count), randn);
        const clips = decode([end]);
        yield null;
        world.held.set(key, { clips, ...video.measured(clips) });
      }
      const { clips, right, off } = world.held.get(key), made = panel(row, count);
      made.clips.values = Uint8Array.from(clips.data, (grey) => Math.round(255 * grey));
      Object.assign(made.measures, { "balls as asked": `${Math.round(100 * right)}%`, "off straight flight": `${off.toFixed(2)} px` });
      rows[row][column] = made;
      yield scene();
    }
}

export const COMPUTED = { race, triangle, backward_simulation: backwardSimulation, exposure, draw, video: clipsByStep };
