// The viewer of one video: panels, player, filmstrip, timeline, tables.

const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const VALUE = new Map([...ALPHABET].map((letter, index) => [letter, index]));
const INTERVAL = 180; // milliseconds between two frames of the player
const OPTIONS = {picture: true, fill: true, labels: true, truth: false};
const HIDDEN = new Set(); // panels that are switched off
let PLAYER = null;

/** The outline that vis.visualization.report.outlines wrote: a path in units of the grid, and its box. */
function readOutline(text) {
  const numbers = [];
  for (let at = 0; at < text.length;) {
    let value = 0;
    for (let shift = 0; ; shift += 5) {
      const bits = VALUE.get(text[at++]);
      value += (bits & 31) * 2 ** shift;
      if (!(bits & 32)) break;
    }
    numbers.push(value % 2 ? -(value + 1) / 2 : value / 2);
  }
  const path = new Path2D();
  const box = [Infinity, Infinity, -Infinity, -Infinity];
  for (let at = 0; at < numbers.length;) {
    const points = numbers[at++];
    let [x, y] = [0, 0];
    for (let point = 0; point < points; point++) {
      x += numbers[at++];
      y += numbers[at++];
      if (point) path.lineTo(x, y);
      else path.moveTo(x, y);
      box[0] = Math.min(box[0], x); box[1] = Math.min(box[1], y);
      box[2] = Math.max(box[2], x); box[3] = Math.max(box[3], y);
    }
    path.closePath();
  }
  return {path, box};
}

class Player {
  constructor(id) {
    this.video = JSON.parse(byId(`video-${id}`).textContent);
    this.entry = SUMMARY.videos.find((video) => video.id === id);
    this.objects = this.video.truth.filter((item) => !item.crowd);
    this.at = 0; // index into video.frames
    this.focus = null; // number of the colour that is picked out
    this.timer = null;
    this.cache = new Map();
    this.parts = [
      {title: "Ground truth", tracks: this.video.truth.map((item) => ({...item, colour: item.number}))},
      ...this.video.runs.map((run, index) => ({title: SUMMARY.runs[index].name, tracks: run.tracks, run: index})),
    ];
  }

  get frame() { return this.video.frames[this.at]; }

  outlines(part) {
    const key = `${this.at}/${part}`;
    if (!this.cache.has(key)) {
      const flat = (this.video.outlines[this.at] || [])[part] || [];
      const found = [];
      for (let at = 0; at < flat.length; at += 2) found.push({track: this.parts[part].tracks[flat[at]], ...readOutline(flat[at + 1])});
      found.sort((a, b) => area(b.box) - area(a.box)); // the small ones on top
      this.cache.set(key, found);
    }
    return this.cache.get(key);
  }

  build() {
    const video = this.video;
    this.images = video.pictures.map((data) => data && el("img", {alt: "", src: `data:image/jpeg;base64,${data}`}));
    video.pictures = null; // the pages' copy is enough
    this.panels = this.parts.map((part, index) => this.panel(part, index));
    this.slider = el("input", {type: "range", min: 0, max: Math.max(0, video.frames.length - 1), value: 0, "aria-label": "frame",
      oninput: () => this.go(Number(this.slider.value))});
    this.label = el("output");
    this.play = el("button", {type: "button", class: "tool main", onclick: () => this.toggle()}, "\u25b6 Play");
    this.strip = el("div", {class: "strip"}, ...video.frames.map((frame, index) => el("button", {type: "button", tabindex: -1,
      "aria-label": `frame ${frame + 1}`, title: `frame ${frame + 1}`, onclick: () => this.go(index)}, this.images[index])));
    this.timeline = el("div", {class: "timeline"});
    const step = (text, label, go) => el("button", {type: "button", class: "tool", "aria-label": label, title: label, onclick: go}, text);
    byId("viewer").replaceChildren(...[
      el("div", {class: "viewer-head"}, el("h2", null, this.entry.name),
        el("span", {class: "sub"}, `#${video.id} \u00b7 ${plural(video.length, "frame")} \u00b7 ${plural(this.objects.length, "object")}`),
        el("span", {class: "push"}, step("\u2191 Previous", "previous video (k)", () => neighbour(-1)), step("\u2193 Next", "next video (j)", () => neighbour(1)))),
      video.note ? el("p", {class: "note"}, video.note) : null,
      this.toggles(),
      el("div", {class: "panels"}, ...this.panels.map((panel) => panel.figure)),
      video.frames.length ? null : el("p", {class: "note mild"}, "No frame of this video fits the size of the report; its numbers are below."),
      el("div", {class: "player"}, this.play, step("\u25c0", "previous frame (arrow left)", () => this.go(this.at - 1)),
        step("\u25b6", "next frame (arrow right)", () => this.go(this.at + 1)), this.slider, this.label),
      this.strip,
      el("h3", null, "Who is who", el("span", {class: "sub"}, "every frame of the video; dots: frames with a picture; click to go there")),
      this.timeline, this.legend(),
      this.tables(),
    ].filter((node) => node !== null));
    for (const image of this.images) {
      if (image && !image.complete) image.addEventListener("load", () => this.drawPanels());
    }
    this.resizer = new ResizeObserver(() => this.draw());
    this.resizer.observe(byId("viewer"));
    this.draw();
  }

  close() {
    this.stop();
    this.resizer.disconnect();
  }

  panel(part, index) {
    const [width, height] = this.video.size;
    const canvas = el("canvas", {role: "img", "data-part": index});
    canvas.style.aspectRatio = `${width} / ${height}`;
    const letter = TWO && index ? el("span", {class: `run-${index - 1}`}, LETTERS[index - 1]) : null;
    const figure = el("figure", {class: "panel", hidden: HIDDEN.has(index)}, el("figcaption", null, letter, part.title), canvas);
    canvas.addEventListener("click", (event) => this.pick(canvas, index, event));
    return {figure, canvas};
  }

  toggles() {
    const box = (title, checked, change) => el("label", null, el("input", {type: "checkbox", checked, onchange: (event) => change(event.target.checked)}), title);
    const panel = (index) => (checked) => {
      if (checked) HIDDEN.delete(index);
      else HIDDEN.add(index);
      this.panels[index].figure.hidden = !checked;
      this.drawPanels();
    };
    const option = (key) => (checked) => { OPTIONS[key] = checked; this.drawPanels(); };
    return el("div", {class: "toggles"},
      ...this.parts.map((part, index) => box(index && TWO ? `${LETTERS[index - 1]} ${part.title}` : part.title, !HIDDEN.has(index), panel(index))),
      box("Picture", OPTIONS.picture, option("picture")), box("Fill", OPTIONS.fill, option("fill")),
      box("Labels", OPTIONS.labels, option("labels")), box("Truth as dashed line", OPTIONS.truth, option("truth")));
  }

  legend() {
    const mark = (text, ...shapes) => el("span", null, svg("svg", {viewBox: "0 0 22 12", "aria-hidden": "true"}, ...shapes), text);
    return el("div", {class: "legend timeline"},
      mark("covered (colour: the track)", svg("rect", {width: 22, height: 12, rx: 2, fill: colourOf(1)})),
      mark("covered, wrong class", svg("rect", {width: 22, height: 12, rx: 2, fill: colourOf(1)}), svg("rect", {width: 22, height: 12, rx: 2, fill: "url(#hatch)"})),
      mark("nothing covers it", svg("rect", {x: .5, y: .5, width: 21, height: 11, rx: 2, class: "gap"})),
      mark("switch to another track", svg("path", {d: "M6 1h10l-5 8z", class: "switch"})),
      mark("empty: not in the frame", svg("path", {d: "M0 6h22", class: "row-line"})));
  }

  // moving

  go(at) {
    const last = this.video.frames.length - 1;
    if (last < 0) return; // no frame fitted the size of the report
    this.at = Math.min(last, Math.max(0, at));
    this.drawPanels();
    this.drawCursor();
  }

  goToFrame(frame) {
    const away = this.video.frames.map((other) => Math.abs(other - frame));
    this.go(away.indexOf(Math.min(...away)));
  }

  toggle() {
    if (this.timer !== null) { this.stop(); return; }
    this.play.textContent = "\u275a\u275a Pause";
    this.timer = setInterval(() => this.go((this.at + 1) % this.video.frames.length), INTERVAL);
  }

  stop() {
    if (this.timer !== null) clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "\u25b6 Play";
  }

  setFocus(number) {
    this.focus = this.focus === number ? null : number;
    for (const row of byId("viewer").querySelectorAll("tr[data-colour]")) {
      row.classList.toggle("on", Number(row.dataset.colour) === this.focus);
    }
    this.drawPanels();
  }

  pick(canvas, part, event) {
    const box = canvas.getBoundingClientRect();
    const pen = canvas.getContext("2d");
    const [x, y] = [(event.clientX - box.left) / box.width * this.video.size[0], (event.clientY - box.top) / box.height * this.video.size[1]];
    pen.save();
    pen.resetTransform();
    const hit = [...this.outlines(part)].reverse().find((item) => pen.isPointInPath(item.path, x, y, "evenodd"));
    pen.restore();
    this.setFocus(hit ? hit.track.colour : this.focus);
  }

  // drawing

  draw() {
    this.drawTimeline();
    this.drawPanels();
    this.drawCursor();
  }

  drawPanels() {
    this.panels.forEach((panel, index) => { if (!panel.figure.hidden) this.drawPanel(panel.canvas, index); });
    [...this.strip.children].forEach((button, index) => {
      if (index === this.at) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    });
    const current = this.strip.children[this.at];
    if (current) {
      const [left, right] = [current.offsetLeft - this.strip.offsetLeft, current.offsetLeft - this.strip.offsetLeft + current.offsetWidth];
      if (left < this.strip.scrollLeft) this.strip.scrollLeft = left - 4;
      if (right > this.strip.scrollLeft + this.strip.clientWidth) this.strip.scrollLeft = right - this.strip.clientWidth + 4;
    }
    this.slider.value = this.at;
    this.label.textContent = this.video.frames.length ? `frame ${this.frame + 1} of ${this.video.length}` : "no frames";
  }

  drawPanel(canvas, part) {
    const ratio = window.devicePixelRatio || 1;
    const [gridWidth, gridHeight] = this.video.size;
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const height = Math.max(1, Math.round(width * gridHeight / gridWidth));
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    const pen = canvas.getContext("2d");
    pen.resetTransform();
    pen.globalAlpha = 1;
    pen.fillStyle = "#7b7f88";
    pen.fillRect(0, 0, width, height);
    const image = this.images[this.at];
    if (image && image.naturalWidth && OPTIONS.picture) pen.drawImage(image, 0, 0, width, height);
    if (!image && OPTIONS.picture && this.video.frames.length) noPicture(pen, width, ratio);
    const scale = width / gridWidth;
    pen.scale(scale, height / gridHeight);
    const items = this.outlines(part);
    for (const item of items) this.drawMask(pen, item, ratio / scale);
    if (part && OPTIONS.truth) for (const item of this.outlines(0)) dashed(pen, item, ratio / scale);
    pen.resetTransform();
    pen.globalAlpha = 1;
    const taken = [];
    if (OPTIONS.labels) for (const item of [...items].reverse()) this.drawLabel(pen, item, scale, ratio, taken);
    canvas.setAttribute("aria-label", `${this.parts[part].title}, frame ${this.frame + 1}: ${items.map((item) => labelOf(item.track)).join(", ") || "nothing"}`);
  }

  drawMask(pen, item, unit) {
    const dim = this.focus !== null && item.track.colour !== this.focus;
    const colour = item.track.crowd ? "#9aa2b1" : colourOf(item.track.colour);
    pen.fillStyle = pen.strokeStyle = colour;
    pen.lineJoin = "round";
    pen.globalAlpha = dim ? 0.08 : this.focus !== null ? 0.55 : 0.42;
    if (OPTIONS.fill) pen.fill(item.path, "evenodd");
    pen.globalAlpha = dim ? 0.3 : 1;
    pen.setLineDash(item.track.crowd ? [4 * unit, 3 * unit] : []);
    pen.lineWidth = (dim ? 1 : 2) * unit;
    pen.stroke(item.path);
    pen.setLineDash([]);
  }

  drawLabel(pen, item, scale, ratio, taken) {
    if (this.focus !== null && item.track.colour !== this.focus) return;
    const colour = item.track.crowd ? "#9aa2b1" : colourOf(item.track.colour);
    pen.font = `600 ${11 * ratio}px system-ui, sans-serif`;
    const text = labelOf(item.track);
    const [wide, high] = [pen.measureText(text).width + 8 * ratio, 16 * ratio];
    const [x, y] = place(item.box.map((value) => value * scale), wide, high, pen.canvas, taken, ratio);
    taken.push([x, y, x + wide, y + high]);
    pen.fillStyle = colour;
    pen.beginPath();
    pen.roundRect(x, y, wide, high, 4 * ratio);
    pen.fill();
    pen.fillStyle = inkOn(colour);
    pen.textBaseline = "middle";
    pen.fillText(text, x + 4 * ratio, y + high / 2 + 0.5 * ratio);
  }

  // tables

  tables() {
    const who = (number, text, colour) => chip(colour, `${text}${number}`);
    const objects = el("table", null,
      el("thead", null, el("tr", null, ...["object", "class", "frames", "size"].map((title, index) => el("th", {class: index === 1 ? "text" : null}, title)),
        ...SUMMARY.runs.flatMap((run, index) => (TWO ? [`IoU ${LETTERS[index]}`, `track ${LETTERS[index]}`, `switches ${LETTERS[index]}`] : ["IoU", "track", "covered", "switches"]).map((title) => el("th", null, title))))),
      el("tbody", null, ...this.objects.map((item, g) => this.row(item.number, el("td", null, who(item.number, "", item.number)), el("td", {class: "text"}, item.name),
        el("td", null, String(item.frames)), el("td", null, `${Math.round(Math.sqrt(item.area))}\u00b2`),
        ...this.video.runs.flatMap((run) => {
          const line = run.objects[g];
          const match = line.match >= 0 ? run.tracks[line.match] : null;
          const cells = [el("td", {class: line.iou >= 0.5 ? null : "down"}, percent(line.iou)),
            el("td", null, match ? who(match.number, "", match.colour) : el("span", {class: "mute"}, "\u2013"))];
          if (!TWO) cells.push(el("td", null, `${line.covered}/${item.frames}`));
          return [...cells, el("td", {class: line.switches ? "down" : "mute"}, String(line.switches))];
        })))));
    const wide = el("div", {class: TWO ? "wide" : null}, el("h3", null, "Objects of the ground truth"), this.objects.length ? objects : el("p", {class: "mute"}, "none in this video"));
    const runs = this.video.runs.map((run, index) => el("div", null,
      el("h3", null, TWO ? el("span", {class: `run-${index}`}, `${LETTERS[index]} `) : null, `Tracks of ${SUMMARY.runs[index].name}`),
      run.tracks.length ? el("table", null,
        el("thead", null, el("tr", null, ...["track", "class", "score", "frames", "IoU", "best object", "verdict"].map((title, at) => el("th", {class: at === 1 || at === 6 ? "text" : null}, title)))),
        el("tbody", null, ...run.tracks.map((track) => this.row(track.colour, el("td", null, who(track.number, "", track.colour)), el("td", {class: "text"}, track.name),
          el("td", null, show(track.score, 2)), el("td", null, String(track.frames)), el("td", null, percent(track.iou)),
          el("td", null, track.object >= 0 ? chip(this.objects[track.object].number, String(this.objects[track.object].number)) : "\u2013"),
          el("td", {class: `text verdict ${track.verdict === "found" ? "up" : track.verdict === "on a crowd" ? "mute" : "down"}`}, track.verdict)))))
        : el("p", {class: "mute"}, `no track scored ${SUMMARY.threshold} or more`)));
    return el("div", {class: "tables"}, wide, ...runs);
  }

  row(colour, ...cells) {
    return el("tr", {"data-colour": colour, tabindex: 0, title: "show it alone", onclick: () => this.setFocus(colour),
      onkeydown: (event) => { if (event.key === "Enter") this.setFocus(colour); }}, ...cells);
  }
}

const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);

function labelOf(track) {
  if (track.crowd) return `${track.name} (crowd)`;
  return `${track.name} #${track.number}${track.score === undefined ? "" : `  ${track.score.toFixed(2)}`}`;
}

/** Top-left corner of a label: near its object, off the labels that are there, where there is room. */
function place([x0, y0, x1, y1], wide, high, canvas, taken, ratio) {
  const places = [];
  for (const y of [y0 - high - ratio, y1 + ratio, (y0 + y1 - high) / 2, y0 + ratio, y0 - 2 * high, y1 + high]) {
    for (const x of [x0, x1 - wide, (x0 + x1 - wide) / 2]) {
      places.push([Math.max(0, Math.min(x, canvas.width - wide)), Math.max(0, Math.min(y, canvas.height - high))]);
    }
  }
  const hidden = ([x, y]) => taken.reduce((total, [left, top, right, bottom]) =>
    total + Math.max(0, Math.min(x + wide, right) - Math.max(x, left)) * Math.max(0, Math.min(y + high, bottom) - Math.max(y, top)), 0);
  const cost = places.map(hidden);
  return places[cost.indexOf(Math.min(...cost))];
}

function dashed(pen, item, unit) {
  pen.globalAlpha = 1;
  for (const [colour, dash] of [["#000", []], ["#fff", [5 * unit, 4 * unit]]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = 1.4 * unit;
    pen.setLineDash(dash);
    pen.stroke(item.path);
  }
  pen.setLineDash([]);
}

function noPicture(pen, width, ratio) {
  pen.fillStyle = "#e6e8ec";
  pen.font = `${11 * ratio}px system-ui, sans-serif`;
  pen.textAlign = "right";
  pen.textBaseline = "top";
  pen.fillText("no picture", width - 6 * ratio, 6 * ratio);
  pen.textAlign = "left";
}

function openVideo(id) {
  const playing = PLAYER !== null && PLAYER.timer !== null;
  if (PLAYER !== null) PLAYER.close();
  PLAYER = new Player(id);
  PLAYER.build();
  if (playing) PLAYER.toggle();
  markOpen(true);
}
