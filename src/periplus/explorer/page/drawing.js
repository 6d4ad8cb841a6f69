"use strict";
// A sheet to draw on with mouse, finger or keys, and its drawing in the size of the data.
var Periplus = window.Periplus || {};
window.Periplus = Periplus;

Periplus.Sheet = function (canvas, say) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const step = 8, pen = { x: 140, y: 140, down: false };
  let last = null, width = 22;

  function clear() {
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    pen.x = pen.y = 140; pen.down = false; last = null;
  }
  function stroke(from, to) {
    context.strokeStyle = "#fff";
    context.lineWidth = width; context.lineCap = context.lineJoin = "round";
    context.beginPath(); context.moveTo(from.x, from.y); context.lineTo(to.x, to.y + 0.01); context.stroke();
  }
  function place(event) {
    const box = canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) * canvas.width / box.width, y: (event.clientY - box.top) * canvas.height / box.height };
  }
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); last = place(event); stroke(last, last); event.preventDefault(); });
  canvas.addEventListener("pointermove", (event) => { if (last) { const to = place(event); stroke(last, to); last = to; } });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === " ") {
      pen.down = !pen.down;
      if (pen.down) stroke(pen, pen);
    } else if (moves[event.key]) {
      const to = { x: Math.min(270, Math.max(10, pen.x + step * moves[event.key][0])), y: Math.min(270, Math.max(10, pen.y + step * moves[event.key][1])) };
      if (pen.down) stroke(pen, to);
      pen.x = to.x; pen.y = to.y;
    } else return;
    event.preventDefault();
    say(`Pen ${pen.down ? "down" : "up"} at ${Math.round(pen.x / 2.8)} %, ${Math.round(pen.y / 2.8)} %.`);
  });
  clear();

  // The drawing as bytes (C, H, W); with fit its figure is scaled to that part of the side and its centre of mass put into the middle. Null if empty.
  function read([channels, height, width], fit) {
    const side = canvas.width, light = context.getImageData(0, 0, side, side).data;
    let left = side, right = -1, top = side, bottom = -1, mass = 0, atX = 0, atY = 0;
    for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) {
      const value = light[4 * (y * side + x)];
      if (value > 40) { left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y); }
      mass += value; atX += value * x; atY += value * y;
    }
    if (right < 0) return null;
    const scale = fit ? fit * Math.max(height, width) / Math.max(right - left + 1, bottom - top + 1) : Math.max(height, width) / side;
    const middle = fit >= 0.95 ? { x: (left + right + 1) / 2, y: (top + bottom + 1) / 2 } : { x: atX / mass + 0.5, y: atY / mass + 0.5 };
    const centre = fit ? middle : { x: side / 2, y: side / 2 };
    // area averages: every pixel of the small image is the mean of what lies under it
    const grey = new Uint8Array(height * width), fine = 6;
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      let sum = 0;
      for (let v = 0; v < fine; v++) for (let u = 0; u < fine; u++) {
        const sx = Math.floor(centre.x + (x + (u + 0.5) / fine - width / 2) / scale), sy = Math.floor(centre.y + (y + (v + 0.5) / fine - height / 2) / scale);
        if (sx >= 0 && sy >= 0 && sx < side && sy < side) sum += light[4 * (sy * side + sx)];
      }
      grey[y * width + x] = Math.round(sum / (fine * fine));
    }
    const image = new Uint8Array(channels * height * width);
    for (let c = 0; c < channels; c++) image.set(grey, c * height * width);
    return image;
  }
  // A stroke covers a good pixel of the data, however few they have.
  const setPixels = (side) => { width = Math.max(22, 1.2 * canvas.width / side); };
  return { clear, read, setPixels };
};

// An image file as bytes (C, H, W), in the browser: for the page without a server.
Periplus.readFile = async function (file, [channels, height, width], negative) {
  const bitmap = await createImageBitmap(file, { resizeWidth: width, resizeHeight: height, resizeQuality: "high" });
  const canvas = document.createElement("canvas");
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext("2d");
  context.fillStyle = "#000"; context.fillRect(0, 0, width, height); context.drawImage(bitmap, 0, 0, width, height);
  const found = context.getImageData(0, 0, width, height).data, image = new Uint8Array(channels * height * width), pixels = height * width;
  for (let p = 0; p < pixels; p++) {
    const [r, g, b] = [found[4 * p], found[4 * p + 1], found[4 * p + 2]];
    const values = channels === 1 ? [Math.round(0.299 * r + 0.587 * g + 0.114 * b)] : [r, g, b];
    for (let c = 0; c < channels; c++) image[c * pixels + p] = negative ? 255 - values[c] : values[c];
  }
  return image;
};
