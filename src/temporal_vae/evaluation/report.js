"use strict";
// Every player draws the frame of one number, so they cannot run apart. Pictures are decoded when
// their clip comes near the window, and given up when it goes.

const picture = (letters) => {
  const bytes = Uint8Array.from(atob(letters), (letter) => letter.charCodeAt(0));
  const type = letters.startsWith("/9j/") ? "image/jpeg" : "image/webp";
  return createImageBitmap(new Blob([bytes], { type }));
};

class Player {
  constructor(section) {
    this.section = section;
    this.data = JSON.parse(this.one('script[type="application/json"]').textContent);
    this.stage = this.one(".stage");
    this.handle = this.one(".handle");
    this.frame = 0;
    this.playing = false;
    this.visit = 0;
    this.heads = [...section.querySelectorAll("svg.chart[data-axis]")].map((svg) => new Head(svg));
    this.slices = [...section.querySelectorAll(".slice")];
    this.listen();
    this.wipe(50);
    this.go(0);
  }

  one(selector) { return this.section.querySelector(selector); }

  listen() {
    this.one(".play").addEventListener("click", () => this.playing ? this.pause() : this.play());
    for (const button of this.section.querySelectorAll(".step"))
      button.addEventListener("click", () => this.step(Number(button.dataset.step)));
    for (const button of this.section.querySelectorAll(".goto"))
      button.addEventListener("click", () => {
        this.seek(Number(button.dataset.frame));
        this.stage.scrollIntoView({ block: "nearest" });
      });
    this.one(".seek").addEventListener("input", (e) => this.seek(Number(e.target.value)));
    for (const kind of ["select.left", "select.right", ".heat"])
      this.one(kind).addEventListener("change", () => this.draw());
    this.one(".speed").addEventListener("change", () => this.playing && this.play());
    drag(this.stage, (x) => this.wipe(100 * x), () => this.handle.focus({ preventScroll: true }));
    this.handle.addEventListener("keydown", (e) => this.onWipeKey(e));
    this.one(".player").addEventListener("keydown", (e) => this.onKey(e));
    for (const head of this.heads) drag(head.svg, (x) => this.seek(head.frameAt(x)));
    for (const slice of this.slices)
      drag(slice, (x) => this.seek(Math.floor(x * this.data.count)));
  }

  async load() {
    const visit = ++this.visit;
    const decode = (list) => Promise.all(list.map(picture));
    const tracks = await Promise.all(this.data.tracks.map(async (track) => ({
      frames: await decode(track.frames), errors: await decode(track.errors),
    })));
    if (visit !== this.visit) return drop(tracks);
    this.tracks = tracks;
    this.stage.removeAttribute("aria-busy");
    this.draw();
  }

  unload() {
    this.visit++;
    this.pause();
    if (this.tracks) drop(this.tracks);
    this.tracks = null;
  }

  play() {
    const start = performance.now(), first = this.frame;
    const speed = Number(this.one(".speed").value) * this.data.fps / 1000;
    const turn = (now) => {
      if (!this.playing || this.start !== start) return;
      this.go((first + Math.floor(Math.max(0, now - start) * speed)) % this.data.count);
      requestAnimationFrame(turn);
    };
    this.start = start;
    this.mark(true);
    requestAnimationFrame(turn);
  }

  pause() { this.mark(false); }

  mark(playing) {
    this.playing = playing;
    const button = this.one(".play");
    button.setAttribute("aria-label", playing ? "Pause" : "Play");
    button.querySelector("path").setAttribute("d", playing ? "M3 2h4v12H3zM9 2h4v12H9z"
      : "M4 2l10 6-10 6z");
  }

  seek(frame) {
    this.pause();
    this.go(Math.min(this.data.count - 1, Math.max(0, frame)));
  }

  step(by) { this.seek((this.frame + by + this.data.count) % this.data.count); }

  go(frame) {
    this.frame = frame;
    const { count, fps } = this.data;
    const said = `frame ${frame} of 0 to ${count - 1}, ${(frame / fps).toFixed(2)} s`;
    const seek = this.one(".seek");
    seek.value = frame;
    seek.setAttribute("aria-valuetext", said);
    this.one(".place").value = said;
    for (const head of this.heads) head.show(frame);
    for (const slice of this.slices) slice.style.setProperty("--at", (frame + 0.5) / count);
    this.draw();
  }

  wipe(percent) {
    const place = Math.min(100, Math.max(0, percent));
    this.stage.style.setProperty("--wipe", `${place}%`);
    this.handle.setAttribute("aria-valuenow", Math.round(place));
    this.handle.setAttribute("aria-valuetext", `${Math.round(place)} percent`);
  }

  draw() {
    const heat = this.one(".heat").checked;
    this.one(".scale").hidden = !heat;
    for (const side of ["left", "right"]) {
      const track = Number(this.one(`select.${side}`).value);
      const error = heat && this.data.tracks[track].errors.length;
      this.one(`.tag.${side}`).textContent = (error ? "error of " : "") + this.data.tracks[track].name;
      this.paint(this.one(`canvas.${side}`), track, heat);
    }
    for (const canvas of this.section.querySelectorAll("canvas.small"))
      this.paint(canvas, Number(canvas.dataset.track), heat);
  }

  paint(canvas, index, heat) {
    if (!this.tracks) return;
    const track = this.tracks[index];
    const shown = (heat && track.errors[this.frame]) || track.frames[this.frame];
    canvas.getContext("2d").drawImage(shown, 0, 0, canvas.width, canvas.height);
    canvas.dataset.frame = this.frame;
  }

  onWipeKey(e) {
    const now = Number(this.handle.getAttribute("aria-valuenow"));
    const to = { ArrowLeft: now - 2, ArrowDown: now - 2, ArrowRight: now + 2, ArrowUp: now + 2,
      PageDown: now - 10, PageUp: now + 10, Home: 0, End: 100 }[e.key];
    if (to === undefined) return;
    e.preventDefault();
    this.wipe(to);
  }

  onKey(e) {
    if (e.ctrlKey || e.metaKey || e.altKey || e.target.matches("select")) return;
    const pressed = e.target.matches("button, input[type=checkbox]");
    const act = { ",": () => this.step(-1), ".": () => this.step(1),
      e: () => this.one(".heat").click(),
      " ": pressed ? null : () => this.one(".play").click() }[e.key];
    if (!act) return;
    e.preventDefault();
    act();
  }
}

// A line over a chart at the frame that is shown.
class Head {
  constructor(svg) {
    this.svg = svg;
    [this.left, this.right, this.first, this.last] = svg.dataset.axis.split(" ").map(Number);
    this.line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    this.line.setAttribute("class", "head");
    svg.append(this.line);
  }

  show(frame) {
    const share = (frame - this.first) / (this.last - this.first);
    const x = this.left + share * (this.right - this.left);
    const { height } = this.svg.viewBox.baseVal;
    this.line.setAttribute("d", `M${x.toFixed(1)} 12V${height - 28}`);
  }

  frameAt(share) {
    const x = share * this.svg.viewBox.baseVal.width;
    const along = (x - this.left) / (this.right - this.left);
    return Math.round(this.first + along * (this.last - this.first));
  }
}

// Calls `moved` with the place across an element, from 0 to 1, while a pointer is down on it.
function drag(element, moved, begun = () => {}) {
  const tell = (e) => {
    const box = element.getBoundingClientRect();
    moved((e.clientX - box.left) / box.width);
  };
  element.addEventListener("pointerdown", (e) => {
    if (e.button) return;
    e.preventDefault();
    element.setPointerCapture(e.pointerId);
    begun();
    tell(e);
  });
  element.addEventListener("pointermove", (e) => {
    if (element.hasPointerCapture(e.pointerId)) tell(e);
  });
}

function drop(tracks) {
  for (const track of tracks) for (const each of [...track.frames, ...track.errors]) each.close();
}

const players = new Map();
for (const section of document.querySelectorAll("section.clip"))
  players.set(section, new Player(section));
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const player = players.get(entry.target);
    entry.isIntersecting ? player.load() : player.unload();
  }
}, { rootMargin: "300px" });
for (const section of players.keys()) near.observe(section);
