"use strict";
// The second backend: a decoder in JavaScript, for the page that needs no server. Layers come from `periplus explore --export`:
//   linear {in, out}, conv and deconv {in, out, kernel, stride, padding, height, width (of the input)}, leaky {slope}, sigmoid.
// Weights are 16-bit integers with a scale for each row (output unit, or input channel of a transposed convolution).
var Periplus = window.Periplus || {};
window.Periplus = Periplus;

Periplus.Network = function (layers) {
  const bytes = (text) => { const raw = atob(text), found = new Uint8Array(raw.length); for (let k = 0; k < raw.length; k++) found[k] = raw.charCodeAt(k); return found.buffer; };
  const little = (text) => { const view = new DataView(bytes(text)), found = new Float32Array(view.byteLength / 2); for (let k = 0; k < found.length; k++) found[k] = view.getInt16(2 * k, true); return found; };
  const floats = (text) => { const view = new DataView(bytes(text)), found = new Float32Array(view.byteLength / 4); for (let k = 0; k < found.length; k++) found[k] = view.getFloat32(4 * k, true); return found; };
  const parts = layers.map((layer) => {
    if (!layer.weight) return layer;
    const weight = little(layer.weight), scale = floats(layer.scale), row = weight.length / scale.length;
    for (let k = 0; k < weight.length; k++) weight[k] *= scale[Math.floor(k / row)];
    return { ...layer, weight, bias: floats(layer.bias) };
  });

  // Four rows at once: sums that do not wait for one another, and every number of the vector is read once for four.
  function linear({ in: n, out: m, weight, bias }, x) {
    const y = new Float32Array(m), whole = m - (m % 4);
    for (let i = 0; i < whole; i += 4) {
      const p = i * n, q = p + n, r = q + n, s = r + n;
      let a = bias[i], b = bias[i + 1], c = bias[i + 2], e = bias[i + 3];
      for (let j = 0; j < n; j++) { const v = x[j]; a += weight[p + j] * v; b += weight[q + j] * v; c += weight[r + j] * v; e += weight[s + j] * v; }
      y[i] = a; y[i + 1] = b; y[i + 2] = c; y[i + 3] = e;
    }
    for (let i = whole; i < m; i++) { let sum = bias[i]; for (let j = 0; j < n; j++) sum += weight[i * n + j] * x[j]; y[i] = sum; }
    return y;
  }
  function linearBack({ in: n, out: m, weight }, g) {
    const found = new Float32Array(n), whole = m - (m % 4);
    for (let i = 0; i < whole; i += 4) {
      const p = i * n, q = p + n, r = q + n, s = r + n, a = g[i], b = g[i + 1], c = g[i + 2], e = g[i + 3];
      for (let j = 0; j < n; j++) found[j] += a * weight[p + j] + b * weight[q + j] + c * weight[r + j] + e * weight[s + j];
    }
    for (let i = whole; i < m; i++) for (let j = 0; j < n; j++) found[j] += g[i] * weight[i * n + j];
    return found;
  }
  // A convolution and its transpose are one loop over the places where a kernel meets an image: (small place, large place, weight).
  // conv: small is the output (weights out x in), deconv: small is the input (weights in x out). toLarge says which way values flow.
  function meet(layer, small, large, toLarge) {
    const { kernel, stride, padding, weight } = layer, convolves = layer.kind === "conv";
    const [smallC, largeC] = convolves ? [layer.out, layer.in] : [layer.in, layer.out];
    const [smallH, smallW] = convolves ? [layer.outHeight, layer.outWidth] : [layer.height, layer.width];
    const [largeH, largeW] = convolves ? [layer.height, layer.width] : [layer.outHeight, layer.outWidth];
    for (let a = 0; a < smallC; a++) for (let b = 0; b < largeC; b++) for (let u = 0; u < kernel; u++) for (let v = 0; v < kernel; v++) {
      const w = weight[((a * largeC + b) * kernel + u) * kernel + v];
      for (let i = 0; i < smallH; i++) {
        const y = i * stride - padding + u;
        if (y < 0 || y >= largeH) continue;
        const from = (a * smallH + i) * smallW, to = (b * largeH + y) * largeW;
        for (let j = 0; j < smallW; j++) {
          const x = j * stride - padding + v;
          if (x < 0 || x >= largeW) continue;
          if (toLarge) large[to + x] += w * small[from + j]; else small[from + j] += w * large[to + x];
        }
      }
    }
  }
  function convolution(layer, x) {
    const pixels = layer.outHeight * layer.outWidth, y = new Float32Array(layer.out * pixels);
    for (let c = 0; c < layer.out; c++) y.fill(layer.bias[c], c * pixels, (c + 1) * pixels);
    if (layer.kind === "conv") meet(layer, y, x, false); else meet(layer, x, y, true);
    return y;
  }
  function convolutionBack(layer, g) {
    const found = new Float32Array(layer.in * layer.height * layer.width);
    if (layer.kind === "conv") meet(layer, g, found, true); else meet(layer, found, g, false);
    return found;
  }
  const forward = { linear, conv: convolution, deconv: convolution,
    leaky: ({ slope }, x) => x.map((value) => (value < 0 ? slope * value : value)), sigmoid: (_, x) => x.map((value) => 1 / (1 + Math.exp(-value))) };
  const backward = { linear: linearBack, conv: convolutionBack, deconv: convolutionBack,
    leaky: ({ slope }, g, x) => g.map((value, k) => (x[k] < 0 ? slope * value : value)), sigmoid: (_, g, __, y) => g.map((value, k) => value * y[k] * (1 - y[k])) };

  // The image (floats, C*H*W) of a code; with `trace`, every layer's input and output on the way.
  function decode(code, trace) {
    let x = Float32Array.from(code);
    for (const part of parts) { const y = forward[part.kind](part, x); if (trace) trace.push([x, y]); x = y; }
    return x;
  }
  // A function of the image, by value and gradient (image -> [value, gradient over pixels]), as one of the code.
  function pull(code, of) {
    const trace = [], image = decode(code, trace), [value, slope] = of(image);
    let g = slope;
    for (let k = parts.length - 1; k >= 0; k--) g = backward[parts[k].kind](parts[k], g, ...trace[k]);
    return { value, gradient: g, image };
  }
  return { decode, pull };
};

Periplus.local = function (page) {
  const network = Periplus.Network(page.layers), d = page.run.latent_dim, unpack = Periplus.unpack;
  const STARTS = 8, STEPS = 120, NODES = 16, ROUNDS = 24;
  const pause = () => new Promise((done) => setTimeout(done));
  const levels = (image) => Uint8Array.from(image, (value) => Math.round(255 * Math.min(1, Math.max(0, value))));
  const gallery = page.gallery.map((record) => ({ ...record, image: unpack(record.image) }));

  // Normal numbers from a seed (mulberry32 and Box-Muller): the same on every machine.
  function normals(seed) {
    let state = seed >>> 0;
    const uniform = () => { state = (state + 0x6d2b79f5) >>> 0; let t = Math.imul(state ^ (state >>> 15), 1 | state); t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t; return ((t ^ (t >>> 14)) >>> 0) / 4294967296; };
    return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  }
  const draw = (normal) => Array.from({ length: d }, normal);
  const squared = (target) => (image) => {
    const slope = new Float32Array(image.length);
    let sum = 0;
    for (let k = 0; k < image.length; k++) { const away = image[k] - target[k] / 255; sum += away * away; slope[k] = 2 * away; }
    return [sum, slope];
  };
  const inside = (code, radius) => { const norm = Math.hypot(...code); return norm > radius ? code.map((value) => value * radius / norm) : code; };

  // Starts by Adam, each the best of a few draws: what is found is not certified, and the page says so.
  async function race(target, show, signal) {
    const cost = squared(target), normal = normals(7), value = (code) => cost(network.decode(code))[0];
    const runners = Array.from({ length: STARTS }, () => {
      const tries = Array.from({ length: 12 }, () => draw(normal)), errors = tries.map(value), z = tries[errors.indexOf(Math.min(...errors))];
      return { z, best: z, error: Infinity, mean: new Float64Array(d), square: new Float64Array(d), image: null };
    });
    const frame = (step) => ({ stage: "descent", evaluations: step * STARTS, errors: runners.map((r) => r.error), kinds: runners.map(() => "unfinished"), codes: runners.map((r) => [...r.best]), images: runners.map((r) => levels(r.image)) });
    let shown = 0;
    for (let step = 1; step <= STEPS; step++) {
      const rate = 0.15 * (step < 0.7 * STEPS ? 1 : (STEPS - step + 1) / (0.3 * STEPS));
      for (const runner of runners) {
        const { value: error, gradient, image } = network.pull(runner.z, cost);
        if (error < runner.error) Object.assign(runner, { error, best: runner.z, image });
        runner.z = inside(runner.z.map((x, j) => {
          runner.mean[j] = 0.9 * runner.mean[j] + 0.1 * gradient[j]; runner.square[j] = 0.99 * runner.square[j] + 0.01 * gradient[j] ** 2;
          return x - rate * (runner.mean[j] / (1 - 0.9 ** step)) / (Math.sqrt(runner.square[j] / (1 - 0.99 ** step)) + 1e-8);
        }), page.radius);
      }
      if (performance.now() - shown > 250) { show(frame(step)); await pause(); shown = performance.now(); }
      if (signal.aborted) return null;
    }
    const end = frame(STEPS);
    show(end);
    return { ...end, best: end.errors.indexOf(Math.min(...end.errors)), minima: [], statements: [], note: "this page does not certify minima: periplus explore does" };
  }

  // What the program found, told step by step.
  async function replay(record, show, signal) {
    for (const frame of record.frames) {
      if (signal.aborted) return null;
      show({ ...frame, images: frame.codes.map((code) => levels(network.decode(code))) });
      await new Promise((done) => setTimeout(done, 90));
    }
    return { ...record.ending, images: record.ending.codes.map((code) => levels(network.decode(code))),
      minima: record.ending.minima.map((minimum) => ({ ...minimum, picture: Periplus.pack(levels(network.decode(minimum.code))) })) };
  }

  // ---- paths ------------------------------------------------------------------------------------------------------------------------------
  const length = (a, b) => Math.hypot(...a.map((value, j) => value - b[j]));
  const mix = (a, b, t) => a.map((value, j) => value + t * (b[j] - value));
  function priced(nodes, images, count) {
    const gone = [0];
    for (let k = 1; k < nodes.length; k++) gone.push(gone[k - 1] + length(nodes[k - 1], nodes[k]));
    const whole = gone.at(-1), codes = [], lengths = [], price = [], apart = distance(images);
    for (let n = 0, k = 1; n < count; n++) {
      const at = whole * n / (count - 1);
      while (k < nodes.length - 1 && gone[k] < at) k++;
      const code = mix(nodes[k - 1], nodes[k], Math.min(1, Math.max(0, (at - gone[k - 1]) / Math.max(1e-12, gone[k] - gone[k - 1]))));
      codes.push(code); lengths.push(at);
      const shown = network.decode(code);
      price.push((squared(images[0])(shown)[0] + squared(images[1])(shown)[0]) / apart);
    }
    let mean = 0;
    for (let n = 1; n < count; n++) mean += (price[n] + price[n - 1]) / 2 / (count - 1);
    return { codes, length: lengths, price, cost: mean * whole * apart };
  }
  const distance = (images) => images[0].reduce((sum, value, k) => sum + ((value - images[1][k]) / 255) ** 2, 0);
  // A path and the line between its ends as the charts want them. told: what the program certified about it, if it did.
  function passage(nodes, images, told, stage) {
    const ends = [nodes[0], nodes.at(-1)], count = stage === "rough" ? 33 : 129, line = priced(ends, images, count), path = priced(nodes, images, count), apart = distance(images), floor = apart * length(...ends) / 2;
    const found = { line, path, cost: path.cost, straight_cost: line.cost, lower_bound: floor, converged: false, status: "found in this page, not converged", image_distance: apart, distance: length(...ends), ...told, stage };
    return { ...found, score: found.cost / floor, straight_score: found.straight_cost / floor, gap: found.cost / found.lower_bound - 1 };
  }
  // Descent on N sum c_k^2 |step_k|^2 over the nodes, in the metric of the path (a tridiagonal solve), from the straight line.
  async function shorten(ends, images, show, signal) {
    const n = NODES, [first, second] = images.map(squared), apart = distance(images);
    const cost = (image) => { const [a, ga] = first(image), [b, gb] = second(image); return [(a + b) / apart, ga.map((value, k) => (value + gb[k]) / apart)]; };
    let nodes = Array.from({ length: n + 1 }, (_, k) => mix(ends[0], ends[1], k / n)), rate = 0.5, shown = 0;
    const look = async (points) => {
      const found = [];
      for (const point of points) { found.push(network.pull(point, cost)); if (performance.now() - shown > 40) { await pause(); shown = performance.now(); } }
      const steps = points.slice(1).map((point, k) => point.map((value, j) => value - points[k][j])), squares = steps.map((s) => s.reduce((sum, v) => sum + v * v, 0));
      const mean = squares.map((_, k) => (found[k].value + found[k + 1].value) / 2);
      return { found, steps, squares, mean, energy: n * mean.reduce((sum, c, k) => sum + c * c * squares[k], 0) };
    };
    let here = await look(nodes);
    for (let round = 0; round < ROUNDS && rate > 1e-3; round++) {
      const { found, steps, squares, mean } = here, weight = mean.reduce((sum, c) => sum + c * c, 0) / n, right = [];
      for (let i = 1; i < n; i++) right.push(steps[i].map((_, j) => n * (2 * mean[i - 1] ** 2 * steps[i - 1][j] - 2 * mean[i] ** 2 * steps[i][j] + (mean[i - 1] * squares[i - 1] + mean[i] * squares[i]) * found[i].gradient[j]) / (2 * n * weight)));
      const direction = tridiagonal(right), trial = nodes.map((node, i) => (i === 0 || i === n ? node : inside(node.map((value, j) => value - rate * direction[i - 1][j]), page.radius * 1.5)));
      const there = await look(trial);
      if (signal.aborted) break;
      if (there.energy < here.energy) { nodes = trial; here = there; rate = Math.min(1, rate * 1.3); } else rate /= 2.5;
      if (round % 8 === 7) show(passage(nodes, images, {}, "rough"));
    }
    return nodes;
  }
  // Solve (-1, 2, -1) x = right, row vectors at once.
  function tridiagonal(right) {
    const n = right.length, upper = new Float64Array(n), x = right.map((row) => Float64Array.from(row));
    for (let i = 0; i < n; i++) {
      const pivot = 2 + (i ? upper[i - 1] : 0);
      upper[i] = -1 / pivot;
      for (let j = 0; j < d; j++) x[i][j] = (x[i][j] + (i ? x[i - 1][j] : 0)) / pivot;
    }
    for (let i = n - 2; i >= 0; i--) for (let j = 0; j < d; j++) x[i][j] -= upper[i] * x[i + 1][j];
    return x.map((row) => [...row]);
  }

  return {
    live: false,
    provenance: `This page needs no server: weights and decoder are in it. Made by: ${page.command}. Images of the data, their races, certificates and the passages between them were computed by Periplus ${page.version}; what you draw or upload is searched here, with less effort and without certificates.`,
    runs: async () => [page.run],
    samples: async (run, count, seed) => { const normal = normals(1000 + seed), codes = Array.from({ length: count }, () => sample(normal)); return { codes, images: codes.map((code) => levels(network.decode(code))) }; },
    gallery: async (run, first, count, label) => {
      const fitting = gallery.filter((record) => label === null || page.run.classes[label] === record.label), chosen = fitting.slice(first, first + count);
      return { total: fitting.length, index: chosen.map((r) => r.index), labels: chosen.map((r) => r.label), images: chosen.map((r) => r.image) };
    },
    decode: async (run, codes) => codes.map((code) => levels(network.decode(code))),
    invert: async (run, source, told, show, signal) => {
      const known = gallery.find((record) => record.index === source.index);
      if (known) { told({ image: known.image, name: known.name, label: known.label }); return replay(known, show, signal); }
      const image = source.image || (await Periplus.readFile(source.file, page.run.shape, source.negative));
      told({ image, name: source.image ? "drawn" : "uploaded", label: null });
      await pause();
      return race(image, show, signal);
    },
    path: async (run, codes, images, show, signal) => {
      if (distance(images) === 0) throw new Error("both images are the same: a path needs two different ones");
      const same = (a, b) => a.every((value, j) => Math.abs(value - b[j]) < 1e-4);
      for (const kept of page.paths) {
        const [a, b] = [kept.nodes[0], kept.nodes.at(-1)], told = kept.told;
        if (same(a, codes[0]) && same(b, codes[1])) return passage(kept.nodes, images, told, "done");
        if (same(b, codes[0]) && same(a, codes[1])) return passage([...kept.nodes].reverse(), images, told, "done");
      }
      const nodes = await shorten(codes, images, show, signal);
      return passage(nodes, images, { note: "Computed in this page from the straight line, a rough path; the bound is the floor." }, "done");
    },
  };

  // A code of the law that the decoder was trained on: mean + root @ normal.
  function sample(normal) {
    const w = draw(normal);
    return page.root ? page.run.axes.origin.map((value, i) => value + page.root[i].reduce((sum, r, j) => sum + r * w[j], 0)) : w;
  }
};
