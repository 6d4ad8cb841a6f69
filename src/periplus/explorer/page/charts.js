"use strict";
// Charts as SVG, and images on canvases.
var Periplus = window.Periplus || {};
window.Periplus = Periplus;

// Paint bytes (C, H, W) on a canvas, pixel by pixel.
Periplus.paint = function (canvas, image, [channels, height, width]) {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const context = canvas.getContext("2d"), data = context.createImageData(width, height), pixels = height * width;
  for (let p = 0; p < pixels; p++) {
    for (let c = 0; c < 3; c++) data.data[4 * p + c] = image[(channels === 3 ? c : 0) * pixels + p];
    data.data[4 * p + 3] = 255;
  }
  context.putImageData(data, 0, 0);
  canvas.dataset.painted = Periplus.pack(image);
};

(function () {
  const NAMESPACE = "http://www.w3.org/2000/svg";
  function element(name, attributes, parent, text) {
    const made = document.createElementNS(NAMESPACE, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }
  const number = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value >= 0.1 ? value.toFixed(2) : value.toPrecision(1));

  function svg(box, width, height, label) {
    box.replaceChildren();
    return element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, box);
  }

  // Errors of all starts, logarithmic, over the root of evaluations (most happens early). history: [{evaluations, errors, kinds}].
  Periplus.raceChart = function (box, history, best) {
    const width = 520, height = 150, left = 44, right = 8, top = 10, bottom = 26;
    const all = history.flatMap((frame) => frame.errors).filter((v) => v > 0);
    if (!all.length) return;
    const low = Math.log10(Math.min(...all)), high = Math.max(Math.log10(Math.max(...all)), low + 0.3), last = Math.max(1, history.at(-1).evaluations);
    const x = (value) => left + (width - left - right) * Math.sqrt(value / last), y = (value) => top + (height - top - bottom) * (high - Math.log10(Math.max(value, 1e-12))) / (high - low);
    const errors = history.at(-1).errors;
    const picture = svg(box, width, height, `Errors of ${errors.length} starts over ${last} gradients; the lowest is ${number(Math.min(...errors))}`);
    element("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}` }, picture);
    for (const value of [10 ** high, 10 ** ((high + low) / 2), 10 ** low]) element("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, picture, number(value));
    element("text", { x: width - right, y: height - 8, "text-anchor": "end" }, picture, `${last.toLocaleString("en")} gradients`);
    element("text", { x: left, y: height - 8 }, picture, "squared error, log scale");
    for (let s = 0; s < errors.length; s++) {
      const points = history.map((frame) => `${x(frame.evaluations).toFixed(1)} ${y(frame.errors[s]).toFixed(1)}`);
      element("path", { class: s === best ? "start-line leader" : "start-line", d: `M${points.join("L")}` }, picture);
    }
    const kinds = history.at(-1).kinds;
    errors.forEach((value, s) => { if (Periplus.certified(kinds[s])) element("circle", { class: "ended", cx: x(last), cy: y(value), r: 3 }, picture); });
  };

  // The price along both curves over the length gone. Returns a function that puts the cursor at a part t of each.
  Periplus.costChart = function (box, path) {
    const width = 560, height = 220, left = 40, right = 10, top = 12, bottom = 30;
    const longest = Math.max(path.line.length.at(-1), path.path.length.at(-1)), most = Math.max(...path.line.price, ...path.path.price) * 1.05;
    const x = (value) => left + (width - left - right) * value / longest, y = (value) => height - bottom - (height - top - bottom) * value / most;
    const picture = svg(box, width, height, "Price along the straight line and along the least-cost path, over the length gone");
    element("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}` }, picture);
    for (let tick = 0; tick <= most; tick += most > 2.4 ? 1 : 0.5) element("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, picture, tick.toFixed(1));
    element("path", { class: "floor", d: `M${left} ${y(0.5)}H${width - right}` }, picture);
    element("text", { x: width - right, y: y(0.5) - 5, "text-anchor": "end" }, picture, "½: no place is cheaper");
    element("text", { x: width - right, y: height - 8, "text-anchor": "end" }, picture, `length gone, of ${longest.toFixed(2)}`);
    const dots = {};
    for (const name of ["line", "path"]) {
      const points = path[name].price.map((value, k) => `${x(path[name].length[k]).toFixed(1)} ${y(value).toFixed(1)}`);
      element("path", { class: `curve of-${name}`, d: `M${points.join("L")}` }, picture);
      dots[name] = element("circle", { class: `of-${name}`, r: 5.5, "stroke-width": 2 }, picture);
    }
    return (t) => {
      for (const name of ["line", "path"]) {
        const at = Periplus.along(path[name], t);
        dots[name].setAttribute("cx", x(at.length)); dots[name].setAttribute("cy", y(at.price));
      }
    };
  };

  // Costs as bars: the line's, the path's, what no path can undercut.
  Periplus.totals = function (box, path) {
    box.replaceChildren();
    const rows = [["straight line", path.straight_cost, "line"], ["least-cost path", path.cost, "path"], ["lower bound", path.lower_bound, "bound"]];
    for (const [name, value, kind] of rows) {
      const row = document.createElement("div"), track = document.createElement("div"), fill = document.createElement("div"), label = document.createElement("span"), told = document.createElement("b");
      row.className = "total"; track.className = "track"; fill.className = `fill of-${kind}`;
      fill.style.width = `${(100 * value / Math.max(path.straight_cost, path.cost)).toFixed(2)}%`;
      label.textContent = name; told.textContent = `U = ${number(value)}`; told.dataset.value = value;
      track.append(fill); row.append(label, track, told); box.append(row);
    }
  };

  // Where a curve of equal steps is at a part t of its length.
  Periplus.along = function (curve, t) {
    const at = t * (curve.codes.length - 1), k = Math.min(curve.codes.length - 2, Math.floor(at)), part = at - k;
    const mix = (a, b) => a + part * (b - a);
    return { code: curve.codes[k].map((value, j) => mix(value, curve.codes[k + 1][j])), length: mix(curve.length[k], curve.length[k + 1]), price: mix(curve.price[k], curve.price[k + 1]) };
  };
  Periplus.number = number;
  Periplus.certified = (kind) => ["smooth", "kink", "boundary", "flat"].includes(kind);
})();
