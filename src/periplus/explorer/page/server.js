"use strict";
// The first of the two backends: a server that answers. The other one is in network.js; both have the same functions.
var Periplus = window.Periplus || {};
window.Periplus = Periplus;

// Pixels of an image as they travel: base64 of bytes, channel by channel, row by row.
Periplus.unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
Periplus.pack = (bytes) => { let text = ""; for (const byte of bytes) text += String.fromCharCode(byte); return btoa(text); };

Periplus.server = function () {
  async function ask(address, options = {}) {
    const answer = await fetch(address, options);
    const record = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(record.error || `the server answered ${answer.status}`);
    return record;
  }
  const send = (address, record, signal) =>
    ask(address, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(record), signal });

  // Follow a job to its end: every version of its progress goes to `show`. Aborting the signal stops the job.
  async function follow(job, show, signal) {
    let after = -1;
    const stop = () => { fetch(`/api/jobs/${job}`, { method: "DELETE" }).catch(() => {}); };
    signal.addEventListener("abort", stop);
    try {
      for (;;) {
        const record = await ask(`/api/jobs/${job}?after=${after}`);
        after = record.version;
        if (record.state === "done") return record.result;
        if (record.state === "failed") throw new Error(record.message);
        if (record.frame) show(record.frame);
        if (record.state === "stopped") { if (signal.aborted) return null; throw new Error(record.message); }
      }
    } finally { signal.removeEventListener("abort", stop); }
  }

  return {
    live: true,
    provenance: "Everything is computed by the program that serves this page, on its machine.",
    runs: async () => (await ask("/api/runs")).runs,
    axes: (run) => ask(`/api/axes?run=${run}`),
    samples: async (run, count, seed) => {
      const found = await ask(`/api/samples?run=${run}&count=${count}&seed=${seed}`);
      return { codes: found.codes, images: found.images.map(Periplus.unpack) };
    },
    gallery: async (run, first, count, label) => {
      const found = await ask(`/api/images?run=${run}&first=${first}&count=${count}&label=${label ?? ""}`);
      return { ...found, images: found.images.map(Periplus.unpack) };
    },
    decode: async (run, codes) => (await send("/api/decode", { run, codes })).images.map(Periplus.unpack),
    // source: {index}, {image: bytes} or {file, negative}; told: called with the image that is searched, before anything else
    invert: async (run, source, told, show, signal) => {
      let begun;
      if (source.file) {
        const form = new FormData();
        form.append("run", String(run));
        form.append("negative", source.negative ? "1" : "0");
        form.append("file", source.file);
        begun = await ask("/api/invert", { method: "POST", body: form });
      } else {
        begun = await send("/api/invert", source.image ? { run, image: Periplus.pack(source.image) } : { run, index: source.index });
      }
      told({ image: Periplus.unpack(begun.image), name: begun.name, label: begun.label });
      return follow(begun.job, show, signal);
    },
    path: async (run, codes, images, show, signal) => follow((await send("/api/path", { run, codes, images: images.map(Periplus.pack) })).job, show, signal),
    reconstruct: async (image) => (await send("/api/reconstruct", { image: Periplus.pack(image) })).runs,
  };
};
