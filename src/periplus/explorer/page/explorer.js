"use strict";
// The page: what is shown, and what happens when somebody moves. It asks a backend (server.js or network.js) and never computes by itself.
(function () {
  const $ = (selector, within = document) => within.querySelector(selector);
  const make = (name, properties = {}, ...children) => { const made = Object.assign(document.createElement(name), properties); made.append(...children); return made; };
  const { paint, number } = Periplus;
  const embedded = $("#embedded");
  const backend = embedded ? Periplus.local(JSON.parse(embedded.textContent)) : Periplus.server();
  const state = { run: 0, runs: [], code: null, path: null, seed: 0 };
  const slots = {};
  const about = () => state.runs[state.run];

  function trouble(error) {
    const place = $("#trouble");
    place.textContent = error instanceof Error ? error.message : String(error);
    place.hidden = false;
  }
  const guarded = (work) => (...given) => { $("#trouble").hidden = true; return Promise.resolve().then(() => work(...given)).catch(trouble); };

  // Only the newest of a stream of wishes is carried out, one at a time: dragging never queues up.
  function latest(work) {
    let busy = false, wish = null;
    return async (value) => {
      wish = { value };
      if (busy) return;
      busy = true;
      try { while (wish) { const { value: now } = wish; wish = null; await work(now); } } catch (error) { trouble(error); } finally { busy = false; }
    };
  }

  // ---- theme ------------------------------------------------------------------------------------------------------------------------------
  const themes = ["system", "light", "dark"];
  function setTheme(name) {
    if (name === "system") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = name;
    $("#theme").setAttribute("aria-label", `Colour theme: ${name === "system" ? "as the system" : name}`);
    $("#theme").textContent = { system: "◐", light: "☀", dark: "☾" }[name];
    $("#theme").dataset.theme = name;
    try { localStorage.setItem("periplus-theme", name); } catch { /* no storage: the choice lasts as long as the page */ }
  }
  let stored = "system";
  try { stored = localStorage.getItem("periplus-theme") || "system"; } catch { /* as above */ }
  setTheme(themes.includes(stored) ? stored : "system");
  $("#theme").addEventListener("click", () => setTheme(themes[(themes.indexOf($("#theme").dataset.theme) + 1) % themes.length]));

  // A row of pictures as buttons: one stop of the Tab key, arrows within.
  function strip(box, items, chosen) {
    box.replaceChildren(...items.map((item, k) => {
      const canvas = make("canvas"), button = make("button", { type: "button", tabIndex: k ? -1 : 0 }, canvas);
      button.setAttribute("aria-label", item.label);
      button.setAttribute("aria-pressed", "false");
      paint(canvas, item.image, about().shape);
      button.addEventListener("click", () => {
        for (const other of box.children) other.setAttribute("aria-pressed", String(other === button));
        chosen(item);
      });
      return button;
    }));
  }
  function roving(box) {
    box.addEventListener("keydown", (event) => {
      const buttons = [...box.children], at = buttons.indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (at < 0 || to === undefined || !buttons[to]) return;
      buttons[at].tabIndex = -1; buttons[to].tabIndex = 0; buttons[to].focus();
      event.preventDefault();
    });
  }

  // ---- move -------------------------------------------------------------------------------------------------------------------------------
  const coordinate = (k, code = state.code) => about().axes.duals[k].reduce((sum, value, j) => sum + value * (code[j] - about().axes.origin[j]), 0);
  const moved = (code, steps) => code.map((value, j) => steps.reduce((sum, [k, by]) => sum + by * about().axes.directions[k][j], value));
  const REACH = 4;

  const show = latest(async (code) => {
    const [image] = await backend.decode(state.run, [code]);
    paint($("#here"), image, about().shape);
    $("#here").dataset.code = JSON.stringify(code);
  });
  const showMap = latest(async () => {
    const size = 5, [a, b] = padAxes(), base = moved(state.code, [[a, -coordinate(a)], [b, -coordinate(b)]]), codes = [];
    for (let row = 0; row < size; row++) for (let column = 0; column < size; column++) {
      codes.push(moved(base, [[a, REACH * (2 * (column + 0.5) / size - 1)], [b, -REACH * (2 * (row + 0.5) / size - 1)]]));
    }
    const images = await backend.decode(state.run, codes), [channels, height, width] = about().shape, whole = new Uint8Array(channels * size * height * size * width);
    images.forEach((image, n) => {
      const row = Math.floor(n / size), column = n % size;
      for (let c = 0; c < channels; c++) for (let y = 0; y < height; y++)
        whole.set(image.subarray((c * height + y) * width, (c * height + y + 1) * width), (c * size * height + row * height + y) * size * width + column * width);
    });
    paint($("#pad-map"), whole, [channels, size * height, size * width]);
  });
  const padAxes = () => [Number($("#pad-x").value), Number($("#pad-y").value)];

  function setCode(code, keepMap = false) {
    state.code = code;
    show(code);
    for (const slider of document.querySelectorAll("#sliders input")) {
      const value = coordinate(Number(slider.dataset.axis));
      slider.value = value.toFixed(2);
      $("output", slider.parentElement).textContent = value.toFixed(2);
    }
    const [a, b] = padAxes(), [x, y] = [coordinate(a), coordinate(b)];
    const inside = (value) => Math.max(0, Math.min(100, 50 + 50 * value / REACH));
    $("#pad-dot").style.left = `${inside(x)}%`;
    $("#pad-dot").style.top = `${100 - inside(y)}%`;
    $("#pad-value").textContent = `direction ${a + 1}: ${x.toFixed(2)}, direction ${b + 1}: ${y.toFixed(2)} standard deviations`;
    $("#here-facts").textContent = `|z| = ${Math.hypot(...code).toFixed(2)}`;
    if (!keepMap) showMap();
  }
  function movePad(x, y) {
    const [a, b] = padAxes(), limit = (value) => Math.max(-REACH, Math.min(REACH, value));
    setCode(moved(state.code, a === b ? [[a, limit(x) - coordinate(a)]] : [[a, limit(x) - coordinate(a)], [b, limit(y) - coordinate(b)]]), true);
  }
  const pad = $("#pad");
  function toPad(event) {
    const box = pad.getBoundingClientRect();
    movePad(REACH * (2 * (event.clientX - box.left) / box.width - 1), -REACH * (2 * (event.clientY - box.top) / box.height - 1));
  }
  pad.addEventListener("pointerdown", (event) => { pad.setPointerCapture(event.pointerId); toPad(event); });
  pad.addEventListener("pointermove", (event) => { if (pad.hasPointerCapture(event.pointerId)) toPad(event); });
  pad.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 1 : 0.25, by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
    const [a, b] = padAxes();
    if (event.key === "Home") movePad(0, 0); else if (by) movePad(coordinate(a) + by[0], coordinate(b) + by[1]); else return;
    event.preventDefault();
  });

  function buildMove() {
    const { axes } = about();
    $("#sliders").replaceChildren(...axes.directions.map((_, k) => {
      const slider = make("input", { type: "range", min: -REACH, max: REACH, step: 0.05, value: 0, id: `axis-${k}` });
      slider.dataset.axis = k;
      slider.addEventListener("input", () => setCode(moved(state.code, [[k, Number(slider.value) - coordinate(k)]]), true));
      slider.addEventListener("change", () => showMap());
      const label = make("label", { htmlFor: slider.id }, `direction ${k + 1} `, make("span", { className: "quiet", textContent: `${(100 * axes.share[k]).toFixed(0)} %`, title: "of all change" }));
      return make("div", { className: "slider" }, label, slider, make("output", { htmlFor: slider.id }));
    }));
    for (const [name, chosen] of [["#pad-x", 0], ["#pad-y", Math.min(1, axes.directions.length - 1)]]) {
      $(name).replaceChildren(...axes.directions.map((_, k) => make("option", { value: k, textContent: `${k + 1}` })));
      $(name).value = String(chosen);
    }
  }
  for (const name of ["#pad-x", "#pad-y"]) $(name).addEventListener("change", () => setCode(state.code));
  $("#go-origin").addEventListener("click", () => setCode([...about().axes.origin]));
  for (const name of ["a", "b"]) $(`#go-${name}`).addEventListener("click", () => setCode([...slots[name].code]));

  const loadSamples = guarded(async () => {
    const found = await backend.samples(state.run, 24, state.seed);
    strip($("#samples"), found.images.map((image, k) => ({ image, code: found.codes[k], label: `Sample ${k + 1}` })), (item) => setCode([...item.code]));
    if (!state.code) setCode([...found.codes[0]]);
  });
  $("#more-samples").addEventListener("click", () => { state.seed += 1; loadSamples(); });
  roving($("#samples"));

  // ---- locate -----------------------------------------------------------------------------------------------------------------------------
  class Slot {
    constructor(name) {
      this.name = name;
      this.box = $("#slot").content.firstElementChild.cloneNode(true);
      this.reset();
      this.first = 0;
      $("h3", this.box).textContent = `Image ${name.toUpperCase()}`;
      $(".gallery", this.box).setAttribute("aria-label", `Images to choose as ${name.toUpperCase()}`);
      this.box.setAttribute("aria-label", `Image ${name.toUpperCase()}`);
      $(".classes", this.box).addEventListener("change", () => { this.first = 0; this.loadGallery(); });
      $(".more", this.box).addEventListener("click", () => { this.first += 12; this.loadGallery(); });
      $(".draw", this.box).addEventListener("click", () => openSheet(this));
      $(".stop", this.box).addEventListener("click", () => this.control?.abort());
      $("input[type=file]", this.box).addEventListener("change", (event) => {
        const [file] = event.target.files;
        event.target.value = "";
        if (file) this.locate({ file, negative: $(".negative", this.box).checked });
      });
      roving($(".gallery", this.box));
      this.loadGallery = guarded(this.loadGallery.bind(this));
      this.locate = guarded(this.locate.bind(this));
    }
    reset() {
      this.control?.abort();
      Object.assign(this, { image: null, code: null, label: "", history: [], cells: [], result: null, settled: false });
      for (const part of [".race", ".minima", ".certificates", ".stop"]) $(part, this.box).hidden = true;
      for (const part of [".target", ".best"]) { const canvas = $(part, this.box); canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height); delete canvas.dataset.painted; }
      this.say("No image yet: choose one of these, draw, or upload.");
    }
    say(text) { $(".status", this.box).textContent = text; }

    async loadGallery() {
      const { classes, no_images: missing } = about(), choice = $(".classes", this.box);
      if (choice.dataset.run !== String(state.run)) {
        choice.replaceChildren(make("option", { value: "", textContent: "all" }), ...classes.map((label, k) => make("option", { value: k, textContent: label })));
        choice.dataset.run = String(state.run);
        choice.parentElement.hidden = !classes.length;
        this.first = this.name === "a" ? 0 : 12;
      }
      let found = await backend.gallery(state.run, this.first, 12, choice.value === "" ? null : Number(choice.value));
      if (!found.images.length && this.first) { this.first = 0; found = await backend.gallery(state.run, 0, 12, choice.value === "" ? null : Number(choice.value)); }
      $(".more", this.box).hidden = found.total <= 12;
      $(".gallery", this.box).hidden = !found.images.length;
      if (missing) this.say("The images of this run's data were not found: draw or upload one.");
      strip($(".gallery", this.box), found.images.map((image, k) => ({ image, index: found.index[k], label: `Image ${found.index[k]}${found.labels[k] === null ? "" : `, class ${found.labels[k]}`}` })),
        (item) => this.locate({ index: item.index }));
    }

    async locate(source) {
      this.reset();
      const control = new AbortController(), mine = () => this.control === control;
      this.control = control;
      $(".stop", this.box).hidden = false;
      this.say("The starts are being chosen …");
      if (source.index === undefined) for (const button of $(".gallery", this.box).children) button.setAttribute("aria-pressed", "false");
      dropPath();
      try {
        const result = await backend.invert(state.run, source, (told) => mine() && this.begin(told), (frame) => mine() && this.frame(frame), control.signal);
        if (!mine()) return;
        if (result) this.finish(result); else this.say(this.code ? `Stopped: best error so far ${number(this.error)}; nothing is certified.` : "Stopped.");
      } catch (error) { if (mine()) { this.say(error.message); throw error; } } finally {
        if (mine()) { this.control = null; this.settled = Boolean(this.code); $(".stop", this.box).hidden = true; ready(true); refresh(); }
      }
    }
    begin(told) {
      this.image = told.image;
      this.label = told.label === null || told.label === undefined ? told.name : `${told.name} (${told.label})`;
      paint($(".target", this.box), told.image, about().shape);
      $(".target", this.box).setAttribute("aria-label", `The image that is looked for: ${this.label}`);
      $(".target-name", this.box).textContent = this.label;
      $(".race", this.box).hidden = false;
      for (const name of ["a", "b"]) $(`#rates-${name}`).disabled = !slots[name].image;
    }
    frame(frame) {
      const best = frame.errors.indexOf(Math.min(...frame.errors));
      this.history.push({ evaluations: frame.evaluations, errors: frame.errors, kinds: frame.kinds });
      if (this.history.length > 120) this.history = this.history.filter((_, k) => k % 2 === 0 || k === this.history.length - 1);
      this.draw(frame, best);
      Periplus.raceChart($(".race-chart", this.box), this.history, best);
      const certified = frame.kinds.filter(Periplus.certified).length;
      this.say(`${frame.stage === "descent" ? "Racing" : "Certifying"}: best error ${number(frame.errors[best])} after ${frame.evaluations.toLocaleString("en")} gradients`
        + `${certified ? `; ${certified} of ${frame.kinds.length} starts certified` : ""}.`);
      this.settled ||= backend.live && frame.stage !== "descent";
      ready(this.settled);
    }
    draw(frame, best) {
      this.code = frame.codes[best];
      this.error = frame.errors[best];
      paint($(".best", this.box), frame.images[best] instanceof Uint8Array ? frame.images[best] : Periplus.unpack(frame.images[best]), about().shape);
      $(".best", this.box).setAttribute("aria-label", `Best reconstruction so far, squared error ${number(this.error)}`);
      $(".best-name", this.box).textContent = `G(z*), error ${number(this.error)}`;
      $(`#go-${this.name}`).disabled = false;
      const box = $(".starts", this.box);
      if (this.cells.length !== frame.errors.length) {
        this.cells = frame.errors.map(() => ({ canvas: make("canvas"), error: make("div"), kind: make("div") }));
        box.replaceChildren(...this.cells.map((cell) => make("div", { className: "start" }, cell.canvas, cell.error, cell.kind)));
      }
      this.cells.forEach((cell, s) => {
        paint(cell.canvas, frame.images[s] instanceof Uint8Array ? frame.images[s] : Periplus.unpack(frame.images[s]), about().shape);
        cell.canvas.setAttribute("role", "img");
        cell.canvas.setAttribute("aria-label", `Start ${s + 1}, error ${number(frame.errors[s])}, ${word(frame.kinds[s])}`);
        cell.error.textContent = number(frame.errors[s]);
        cell.kind.textContent = word(frame.kinds[s]);
        cell.kind.className = Periplus.certified(frame.kinds[s]) ? "certified" : "open";
        cell.canvas.parentElement.classList.toggle("best", s === best);
      });
    }
    finish(result) {
      this.result = result;
      if (this.history.length) {
        this.history.push({ evaluations: this.history.at(-1).evaluations, errors: result.errors, kinds: result.kinds });
        Periplus.raceChart($(".race-chart", this.box), this.history, result.best);
      }
      this.draw(result, result.best);
      const certified = result.kinds.filter(Periplus.certified).length, total = result.kinds.length;
      this.say(result.minima.length
        ? `Done: ${certified} of ${total} starts certified, ${result.minima.length} distinct ${result.minima.length === 1 ? "minimum" : "minima"}; lowest error ${number(this.error)} (${word(result.kinds[result.best])}).`
        : `Done: lowest error ${number(this.error)}; ${result.note || "no start is certified as a minimum"}.`);
      const ends = result.minima.slice(0, 12), lowest = { error: this.error, kind: result.kinds[result.best], code: this.code, frequency: 1 / total, picture: null };
      if (ends.length && ends[0].error > this.error * 1.0001) ends.unshift(lowest);  // lower than every certified one, and not certified itself
      $(".minima", this.box).hidden = ends.length === 0;
      $(".minima-list", this.box).replaceChildren(...ends.map((minimum, k) => {
        const canvas = make("canvas"), input = make("input", { type: "radio", name: `end-${this.name}`, value: k, checked: k === 0 });
        const picture = minimum.picture ?? result.images[result.best];
        paint(canvas, picture instanceof Uint8Array ? picture : Periplus.unpack(picture), about().shape);
        input.setAttribute("aria-label", `End ${k + 1}: error ${number(minimum.error)}, ${word(minimum.kind)}, reached by ${Math.round(100 * minimum.frequency)} % of the starts`);
        input.addEventListener("change", () => { this.code = minimum.code; dropPath(); ready(true); });
        return make("label", { className: "minimum" }, canvas, make("b", { textContent: number(minimum.error) }), make("br"), `${word(minimum.kind)}, ${Math.round(100 * minimum.frequency)} %`, make("br"), input);
      }));
      if (ends.length) this.code = ends[0].code;
      $(".certificates", this.box).hidden = !result.statements?.length;
      $(".certificates ul", this.box).replaceChildren(...(result.statements || []).map((sentence) => make("li", { textContent: sentence })));
    }
  }
  const word = (kind) => ({ unfinished: "open", smooth: "minimum", kink: "kink", boundary: "edge", flat: "flat", saddle: "saddle", escaped: "escaped" })[kind] || kind;

  // ---- drawing ----------------------------------------------------------------------------------------------------------------------------
  const sheet = Periplus.Sheet($("#sheet"), (text) => { $("#pen").textContent = text; });
  let drawingFor = null;
  function openSheet(slot) {
    drawingFor = slot;
    sheet.setPixels(Math.max(...about().shape.slice(1)));
    $("#drawing-title").textContent = `Draw image ${slot.name.toUpperCase()}`;
    $("#drawing").showModal();
    $("#sheet").focus();
  }
  $("#clear-drawing").addEventListener("click", () => sheet.clear());
  $("#close-drawing").addEventListener("click", () => $("#drawing").close());
  $("#use-drawing").addEventListener("click", () => {
    const image = sheet.read(about().shape, $("#centre").checked ? about().fit : 0);
    if (!image) { $("#pen").textContent = "The sheet is empty: draw something first."; return; }
    $("#drawing").close();
    drawingFor.locate({ image });
  });

  // ---- passage ----------------------------------------------------------------------------------------------------------------------------
  let search = null, wanted = false;
  function dropPath() {
    search?.abort(); search = null;
    state.path = null;
    $("#passage-body").hidden = true;
    $("#stop-path").hidden = true;
    ready(false);
  }
  // Both codes there? `settled` begins the search by itself, once: when the starts of both images have been polished.
  function ready(settled) {
    const both = Boolean(slots.a?.code && slots.b?.code);
    $("#find-path").disabled = !both || Boolean(search);
    if (search || state.path) return;
    $("#path-status").textContent = both ? "Ready: the ends are the codes of A and B as they are now." : "Choose two images above; codes of both are needed.";
    if (both && settled && slots.a.settled && slots.b.settled) findPath();
  }
  // The ends were taken while the starts were still racing: once they have arrived elsewhere, the passage is searched again.
  function refresh() {
    if (search || !state.path || slots.a.control || slots.b.control) return;
    const apart = (a, b) => Math.hypot(...a.map((value, j) => value - b[j]));
    if (["a", "b"].some((name, k) => apart(slots[name].code, state.ends[k]) > 1e-3 * Math.hypot(...state.ends[k]))) findPath();
  }
  const findPath = guarded(async () => {
    if (search) return;
    const control = new AbortController(), mine = () => search === control;
    search = control;
    state.ends = [slots.a.code, slots.b.code];
    $("#find-path").disabled = true; $("#stop-path").hidden = false;
    $("#path-status").textContent = "Searching the cheapest path …";
    try {
      const result = await backend.path(state.run, state.ends, [slots.a.image, slots.b.image], (path) => mine() && showPath(path, false), control.signal);
      if (!mine()) return;
      if (result) showPath(result, true); else $("#path-status").textContent = state.path ? "Stopped: this is the best path so far." : "Stopped.";
    } catch (error) { if (mine()) $("#path-status").textContent = error.message; } finally {
      if (mine()) { search = null; $("#stop-path").hidden = true; $("#find-path").disabled = false; if (!control.signal.aborted) refresh(); }
    }
  });
  $("#find-path").addEventListener("click", findPath);
  $("#stop-path").addEventListener("click", () => search?.abort());

  let setCursor = null;
  function showPath(path, done) {
    state.path = path;
    $("#passage-body").hidden = false;
    setCursor = Periplus.costChart($("#cost-chart"), path);
    Periplus.totals($("#totals"), path);
    const saved = 100 * (1 - path.cost / path.straight_cost);
    $("#path-status").textContent = done ? `Done: the path is ${saved.toFixed(1)} % cheaper than the straight line (${path.status}).` : `A first path, ${saved.toFixed(1)} % cheaper than the line; the search goes on …`;
    const gap = path.gap === null ? "" : ` Gap ${(100 * path.gap).toFixed(0)} %: the best path there is costs at least the lower bound.`;
    $("#path-facts").textContent = `U in units of its floor: line ${path.straight_score.toFixed(3)}, path ${path.score.toFixed(3)} (1 is the floor, 4/3 a cross-fade).${gap}`
      + (path.note ? ` ${path.note}` : ` How much of the gap is the path's and how much the bound's is not known.`);
    moveAlong();
  }
  const showAlong = latest(async (t) => {
    if (!state.path) return;
    const path = state.path, at = ["line", "path"].map((name) => Periplus.along(path[name], t));
    const images = await backend.decode(state.run, at.map((place) => place.code));
    ["line", "path"].forEach((name, k) => {
      const canvas = $(`#view-${name}`);
      paint(canvas, images[k], about().shape);
      canvas.dataset.code = JSON.stringify(at[k].code);
      $(`#price-${name}`).textContent = `c = ${number(at[k].price * path.image_distance)}`;
    });
  });
  function moveAlong() {
    const t = Number($("#along").value) / 200;
    $("#along-value").textContent = `${Math.round(100 * t)} %`;
    $("#along").setAttribute("aria-valuetext", `${Math.round(100 * t)} % of the way from A to B`);
    if (setCursor) setCursor(t);
    showAlong(t);
  }
  $("#along").addEventListener("input", () => { stopPlaying(); moveAlong(); });
  const chart = $("#cost-chart");
  function toChart(event) {
    const box = chart.getBoundingClientRect(), scale = box.width / 560, t = (event.clientX - box.left - 40 * scale) / (510 * scale);
    stopPlaying();
    $("#along").value = Math.round(200 * Math.max(0, Math.min(1, t)));
    moveAlong();
  }
  chart.addEventListener("pointerdown", (event) => { chart.setPointerCapture(event.pointerId); toChart(event); });
  chart.addEventListener("pointermove", (event) => { if (chart.hasPointerCapture(event.pointerId)) toChart(event); });
  let playing = null;
  function stopPlaying() { clearInterval(playing); playing = null; $("#play").textContent = "Play"; $("#play").setAttribute("aria-pressed", "false"); }
  $("#play").addEventListener("click", () => {
    if (playing) { stopPlaying(); return; }
    let by = 2;
    $("#play").textContent = "Pause"; $("#play").setAttribute("aria-pressed", "true");
    playing = setInterval(() => {
      const now = Number($("#along").value);
      if (now + by > 200 || now + by < 0) by = -by;
      $("#along").value = now + by;
      moveAlong();
    }, 60);
  });

  // ---- rates ------------------------------------------------------------------------------------------------------------------------------
  const showRates = guarded(async (name) => {
    const slot = slots[name];
    $("#rates-status").textContent = `Reconstructing image ${name.toUpperCase()} …`;
    const records = await backend.reconstruct(slot.image);
    $("#ladders").replaceChildren(...records.map((record) => {
      const rungs = make("div", { className: "rungs" });
      const tile = (image, text, label) => {
        const canvas = make("canvas");
        paint(canvas, image, about().shape);
        canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", label);
        const box = make("div", { className: "rung" }, canvas);
        box.append(...text.flatMap((line, k) => (k ? [make("br"), line] : [line])));
        rungs.append(box);
      };
      tile(slot.image, ["the image"], "The image itself");
      for (const step of record.steps) tile(Periplus.unpack(step.image), [`k = ${step.kept}`, `R ${step.rate.toFixed(1)}`, `D ${step.distortion.toFixed(1)}`],
        `With ${step.kept} dimensions: rate ${step.rate.toFixed(1)}, distortion ${step.distortion.toFixed(1)} nats`);
      const title = `${record.name}: ${record.model}${record.beta === null ? "" : `, β = ${record.beta}`}; charges ${record.rate.toFixed(1)} nats for this image`;
      return make("div", { className: "ladder" }, make("h3", { textContent: title }), rungs);
    }));
    $("#rates-status").textContent = `Image ${name.toUpperCase()}, ${records.length} ${records.length === 1 ? "autoencoder" : "autoencoders, the cheapest first"}; nats per image.`;
  });
  for (const name of ["a", "b"]) $(`#rates-${name}`).addEventListener("click", () => showRates(name));

  // ---- beginning --------------------------------------------------------------------------------------------------------------------------
  const openRun = guarded(async (which) => {
    Object.assign(state, { run: which, code: null });
    const run = about();
    $("#run-name").textContent = run.name;
    document.title = `${run.name} - Periplus explorer`;
    $("#run-facts").textContent = `${run.model} (${run.architecture}) on ${run.data}, codes of ${run.latent_dim} dimensions, step ${run.step.toLocaleString("en")}`;
    for (const slot of Object.values(slots)) slot.reset();
    for (const name of ["a", "b"]) { $(`#go-${name}`).disabled = true; $(`#rates-${name}`).disabled = true; }
    dropPath();
    const galleries = [slots.a.loadGallery(), slots.b.loadGallery()];
    run.axes ||= await backend.axes(which);
    buildMove();
    await Promise.all([loadSamples(), ...galleries]);
    document.body.dataset.ready = "true";
  });
  guarded(async () => {
    for (const name of ["a", "b"]) { slots[name] = new Slot(name); $("#slots").append(slots[name].box); }
    state.runs = await backend.runs();
    $("#provenance").textContent = backend.provenance;
    $("#run-select").replaceChildren(...state.runs.map((run, k) => make("option", { value: k, textContent: run.name })));
    $("#run-choice").hidden = state.runs.length < 2;
    $("#run-select").addEventListener("change", (event) => openRun(Number(event.target.value)));
    $("#rates").hidden = !backend.reconstruct || !state.runs.some((run) => run.autoencoder);
    await openRun(0);
  })();
})();
