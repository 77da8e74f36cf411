// The timeline of identities, and what starts the page.

const TIMELINE = {left: 168, right: 10, top: 24, gap: 6, bar: 16, thin: 11, lane: 6, lanes: 5};

/** Segments of false tracks in as few lanes as they need: [{start, count, track, lane}]. */
function lanesOf(run) {
  const all = run.tracks.flatMap((track) => track.stray.map(([start, count]) => ({start, count, track})));
  all.sort((a, b) => a.start - b.start || b.count - a.count);
  const ends = [];
  for (const item of all) {
    let lane = ends.findIndex((end) => end <= item.start);
    if (lane < 0) lane = ends.push(0) - 1;
    ends[lane] = item.start + item.count;
    item.lane = lane;
  }
  return all;
}

Player.prototype.drawTimeline = function () {
  const {left, right, top, gap, bar, thin, lane, lanes} = TIMELINE;
  const runs = this.video.runs;
  const width = Math.max(320, this.timeline.clientWidth);
  const high = runs.length > 1 ? thin : bar;
  const x = (frame) => left + frame / this.video.length * (width - left - right);
  this.x = x;
  const nodes = [];
  let y = top;
  this.objects.forEach((item, g) => {
    const block = runs.length * (high + 1) - 1;
    const middle = y + block / 2;
    nodes.push(svg("rect", {x: 0, y: middle - 8, width: 26, height: 16, rx: 4, fill: colourOf(item.number)}),
      svg("text", {x: 13, y: middle + 4, "text-anchor": "middle", fill: inkOn(colourOf(item.number)), style: null, class: "seg-label", "data-ink": inkOn(colourOf(item.number))}, String(item.number)),
      svg("text", {x: 32, y: middle + 4}, clip(item.name, runs.length > 1 ? 15 : 18)));
    runs.forEach((run, index) => {
      const at = y + index * (high + 1);
      if (runs.length > 1) nodes.push(svg("text", {x: left - 8, y: at + high - 2, "text-anchor": "end", class: `axis run-${index}`}, LETTERS[index]));
      nodes.push(svg("line", {x1: left, x2: width - right, y1: at + high / 2, y2: at + high / 2, class: "row-line"}));
      nodes.push(...this.bars(run, item, run.objects[g], at, high, x));
    });
    y += block + gap;
  });
  runs.forEach((run, index) => {
    const items = lanesOf(run);
    const used = Math.max(1, Math.min(lanes, 1 + Math.max(0, ...items.map((item) => item.lane))));
    const block = Math.max(14, used * (lane + 1));
    nodes.push(svg("text", {x: 0, y: y + block / 2 + 4, class: "axis"}, `false tracks${runs.length > 1 ? ` ${LETTERS[index]}` : ""}${items.length ? "" : ": none"}`));
    nodes.push(svg("line", {x1: left, x2: width - right, y1: y + block, y2: y + block, class: "row-line"}));
    for (const item of items.filter((one) => one.lane < lanes)) {
      nodes.push(titled(svg("rect", {x: x(item.start), y: y + item.lane * (lane + 1) + 1, width: Math.max(1.5, x(item.start + item.count) - x(item.start) - .5), height: lane, rx: 1.5,
        fill: colourOf(item.track.colour), "data-false": item.track.number}), `false: ${labelOf(item.track)}, ${span(item.start, item.count)}`));
    }
    y += block + gap;
  });
  const height = y + 2;
  const step = niceStep(this.video.length, (width - left) / 56);
  for (let frame = 0; frame < this.video.length; frame++) {
    if (frame && (frame + 1) % step) continue;
    nodes.push(svg("text", {x: x(frame + .5), y: 10, "text-anchor": "middle", class: "axis"}, String(frame + 1)));
  }
  for (const frame of this.video.frames) nodes.push(svg("circle", {cx: x(frame + .5), cy: 16.5, r: 1.6, class: "sample"}));
  this.cursor = svg("line", {y1: 13, y2: height, class: "cursor"});
  const hatch = svg("pattern", {id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)"},
    svg("rect", {width: 2, height: 5, fill: "#000", "fill-opacity": .55}));
  const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": this.inWords()},
    svg("defs", null, hatch), ...nodes, this.cursor);
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    const part = ((event.clientX - box.left) / box.width * width - left) / (width - left - right);
    if (part >= 0) this.goToFrame(Math.min(this.video.length - 1, Math.floor(part * this.video.length)));
  });
  for (const text of picture.querySelectorAll("[data-ink]")) text.style.fill = text.dataset.ink;
  this.timeline.replaceChildren(picture);
};

/** The line of one object in one run. */
Player.prototype.bars = function (run, item, line, y, high, x) {
  const nodes = [];
  const marks = [];
  let last = -1;
  for (const [start, count, covering] of line.covering) {
    const [from, wide] = [x(start), Math.max(1.5, x(start + count) - x(start) - .5)];
    if (covering < 0) {
      nodes.push(titled(svg("rect", {x: from + .5, y: y + .5, width: Math.max(1, wide - 1), height: high - 1, rx: 2, class: "gap"}), `object ${item.number} (${item.name}): nothing covers it, ${span(start, count)}`));
      continue;
    }
    const track = run.tracks[covering];
    const wrong = track.name !== item.name;
    const colour = colourOf(track.colour);
    const place = {x: from, y, width: wide, height: high, rx: 2};
    const words = `object ${item.number} (${item.name}): track ${labelOf(track)}${wrong ? ", wrong class" : ""}, ${span(start, count)}`;
    nodes.push(titled(svg("rect", {...place, fill: colour, "data-track": track.number}), words));
    if (wrong) nodes.push(titled(svg("rect", {...place, fill: "url(#hatch)"}), words));
    if (wide > 18) nodes.push(svg("text", {x: from + 5, y: y + high / 2 + 3.5, class: "seg-label", "data-ink": inkOn(colour), stroke: colour}, String(track.number)));
    if (last >= 0 && last !== covering) marks.push(svg("path", {d: `M${from - 5} ${y - 5}h10l-5 8z`, class: "switch"}));
    last = covering;
  }
  return [...nodes, ...marks];
};

Player.prototype.drawCursor = function () {
  if (!this.cursor || this.frame === undefined) return;
  const at = this.x(this.frame + .5);
  this.cursor.setAttribute("x1", at);
  this.cursor.setAttribute("x2", at);
};

Player.prototype.inWords = function () {
  return this.video.runs.map((run, index) => `${SUMMARY.runs[index].name}: ` + this.objects.map((item, g) =>
    `object ${item.number}, ${item.name}, covered in ${run.objects[g].covered} of ${item.frames} frames, ${run.objects[g].switches} switches`).join("; ")).join(". ");
};

const span = (start, count) => (count === 1 ? `frame ${start + 1}` : `frames ${start + 1} to ${start + count}`);
const clip = (text, length) => (text.length > length ? text.slice(0, length - 1) + "\u2026" : text);

function titled(node, text) {
  node.append(svg("title", null, text));
  return node;
}

/** The smallest of 1, 2, 5, 10, ... that gives at most `most` labels. */
function niceStep(length, most) {
  for (let unit = 1; ; unit *= 10) {
    for (const step of [unit, 2 * unit, 5 * unit]) if (length / step <= most) return step;
  }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || PLAYER === null) return;
  const busy = event.target.closest("input, select, textarea") !== null;
  if (busy && (event.target.type !== "checkbox" || event.key === " ")) return;
  const actions = {
    ArrowLeft: () => PLAYER.go(PLAYER.at - 1), ArrowRight: () => PLAYER.go(PLAYER.at + 1),
    Home: () => PLAYER.go(0), End: () => PLAYER.go(PLAYER.video.frames.length - 1),
    j: () => neighbour(1), k: () => neighbour(-1), Escape: () => PLAYER.setFocus(PLAYER.focus),
  };
  if (event.target.closest("button, summary, a") === null) actions[" "] = () => PLAYER.toggle();
  if (event.key in actions) {
    event.preventDefault();
    actions[event.key]();
  }
});

drawHead();
drawNumbers();
drawErrors();
drawClasses();
drawHelp();
byId("order").append(...orders().map(([title]) => el("option", null, title)));
byId("order").addEventListener("change", drawList);
byId("search").addEventListener("input", drawList);
byId("video-count").textContent = SUMMARY.videos.length === SUMMARY.total ? String(SUMMARY.total) : `${SUMMARY.videos.length} of ${SUMMARY.total}`;
drawList();
if (LISTED.length) openVideo(LISTED[0].id);
