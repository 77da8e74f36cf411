"use strict";
// Everything is drawn from the json blocks of the page. Texts of those are set as text, never as markup: they come
// from files that nobody vouches for.

const SUMMARY = JSON.parse(document.getElementById("summary").textContent);
const LETTERS = SUMMARY.runs.map((run, index) => String.fromCharCode(65 + index));
const TWO = SUMMARY.runs.length > 1;
const byId = (id) => document.getElementById(id);

/** An element: el("td", {class: "x", onclick: f}, "text", child, ...). */
function el(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "width%") node.style.width = value + "%";
    else if (key === "background") node.style.background = value;
    else if (key === "color") node.style.color = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const show = (value, digits = 1) => (value === null || value === undefined ? "\u2013" : value.toFixed(digits).replace("-", "\u2212"));
const percent = (value, digits = 0) => (value === null || value === undefined ? "\u2013" : (100 * value).toFixed(digits));
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// Colours: those of vis.visualization.track_color, by number.

const colourOf = (number) => SUMMARY.palette[number % SUMMARY.palette.length];

function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((at) => Math.pow(parseInt(colour.slice(at, at + 2), 16) / 255, 2.2));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function chip(number, text) {
  const colour = colourOf(number);
  return el("span", {class: "chip", background: colour, color: inkOn(colour)}, text);
}

// Tables

/** A table whose heads sort it. columns: {title, help, text, value(row), cell(row)}. */
function sortable(columns, rows, start) {
  const body = el("tbody");
  const heads = columns.map((column, index) =>
    el("th", {scope: "col", class: column.text ? "text" : null},
      el("button", {type: "button", title: column.help, onclick: () => sort(index)}, column.title)));
  let [current, falling] = start;
  function draw() {
    heads.forEach((head, index) => {
      if (index === current) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const value = columns[current].value;
    const sorted = [...rows].sort((one, other) => {
      const [x, y] = [value(one), value(other)];
      if (x === y) return 0;
      if (x === null || x === undefined) return 1; // what was not measured comes last either way
      if (y === null || y === undefined) return -1;
      const order = typeof x === "string" ? x.localeCompare(y) : x - y;
      return falling ? -order : order;
    });
    body.replaceChildren(...sorted.map((row) => el("tr", null,
      ...columns.map((column) => el("td", {class: column.text ? "text" : null}, ...[column.cell(row)].flat())))));
  }
  function sort(index) {
    falling = index === current ? !falling : !columns[index].text;
    current = index;
    draw();
  }
  draw();
  return el("table", null, el("thead", null, el("tr", null, ...heads)), body);
}

/** b - a, green where b is better. */
function difference(values, digits, lower) {
  if (values.length < 2 || values.some((value) => value === null)) return el("span", {class: "mute"}, "\u2013");
  const delta = values[1] - values[0];
  if (Math.abs(delta) < 0.5 * Math.pow(10, -digits)) return el("span", {class: "mute"}, "0");
  const better = lower ? delta < 0 : delta > 0;
  return el("span", {class: better ? "up" : "down"}, (delta > 0 ? "+" : "\u2212") + Math.abs(delta).toFixed(digits));
}

// Head and overview

function drawHead() {
  byId("title").textContent = SUMMARY.title;
  byId("facts").append(...SUMMARY.facts.map((fact) => el("div", null, el("dt", null, fact.label),
    el("dd", null, el("span", {class: fact.run === undefined ? null : `run-${fact.run}`}, fact.value), fact.hash ? " " : null,
      fact.hash ? el("code", {title: `sha256 ${fact.hash}`}, fact.hash.slice(0, 12)) : null))));
  byId("notes").append(...SUMMARY.notes.map((note) => el("p", {class: "note mild"}, note)));
  const cards = SUMMARY.groups.flatMap((group) => group.rows).filter((row) => row.card);
  byId("cards").append(...cards.map((row) => el("div", {class: "kpi"},
    el("span", {class: "label"}, el("abbr", {title: row.help}, row.name)),
    el("span", {class: TWO ? "values both" : "values"},
      ...row.values.map((value, index) => el("span", {class: `value ${TWO ? `run-${index}` : ""}`},
        TWO ? el("small", null, LETTERS[index]) : null, show(value, row.digits))),
      TWO ? difference(row.values, row.digits, row.lower) : null))));
}

function drawNumbers() {
  byId("numbers").append(...SUMMARY.groups.map((group) => el("div", {class: "group"}, el("table", null,
    el("caption", null, group.title),
    TWO ? el("thead", null, el("tr", null, el("th", null, ""),
      ...LETTERS.map((letter, index) => el("th", {scope: "col"}, el("span", {class: `run-${index}`}, letter))),
      el("th", {scope: "col"}, "B \u2212 A"))) : null,
    el("tbody", null, ...group.rows.map((row) => el("tr", null,
      el("td", null, el("abbr", {title: row.help}, row.name)),
      ...row.values.map((value) => el("td", null, show(value, row.digits))),
      TWO ? el("td", null, difference(row.values, row.digits, row.lower)) : null)))))));
}

function meter(value, most, run) {
  return el("span", {class: `meter run-${run}`, "aria-hidden": "true"}, el("i", {"width%": most ? Math.max(0, 100 * value / most) : 0}));
}

function drawErrors() {
  const most = Math.max(...SUMMARY.errors.flatMap((row) => row.lost));
  const runs = SUMMARY.runs.map((run, index) => index);
  byId("errors").append(el("table", null,
    el("thead", null, el("tr", null, el("th", null, "kind"),
      ...runs.map((run) => el("th", {scope: "col"}, TWO ? `AP lost ${LETTERS[run]}` : "AP lost")),
      ...runs.map((run) => el("th", {scope: "col", title: "at the IoU threshold 0.50"}, TWO ? `number ${LETTERS[run]}` : "number")))),
    el("tbody", null, ...SUMMARY.errors.map((row) => el("tr", null,
      el("td", null, el("abbr", {title: row.help}, row.name)),
      ...runs.map((run) => el("td", null, show(row.lost[run]), meter(row.lost[run], most, run))),
      ...runs.map((run) => el("td", null, String(row.counts[run]))))))));
}

function drawClasses() {
  const columns = [
    {title: "class", text: true, value: (row) => row.name, cell: (row) => row.name},
    {title: "objects", help: "objects of the ground truth", value: (row) => row.objects, cell: (row) => String(row.objects)},
    ...SUMMARY.runs.map((run, index) => ({
      title: TWO ? `AP ${LETTERS[index]}` : "AP", help: run.name, value: (row) => row.values[index],
      cell: (row) => [show(row.values[index]), meter(row.values[index] || 0, 100, index)],
    })),
  ];
  if (TWO) {
    const delta = (row) => (row.values.includes(null) ? null : row.values[1] - row.values[0]);
    columns.push({title: "B \u2212 A", value: delta, cell: (row) => difference(row.values, 1)});
  }
  byId("classes").append(sortable(columns, SUMMARY.classes, [2, false]));
}

// The list of videos

const sum = (video, key) => video.runs.reduce((total, run) => total + run[key], 0);
const worstOf = (video, index) => (video.runs[index].quality === null ? 2 : video.runs[index].quality);
const gain = (video) => worstOf(video, 1) - worstOf(video, 0);

function orders() {
  const known = SUMMARY.runs.map((run, index) =>
    [TWO ? `worst in ${LETTERS[index]}` : "worst first", (a, b) => worstOf(a, index) - worstOf(b, index)]);
  if (TWO) known.push(["B worse than A", (a, b) => gain(a) - gain(b)], ["B better than A", (a, b) => gain(b) - gain(a)]);
  for (const [title, key] of [["most switches", "switches"], ["most missed", "missed"], ["most false tracks", "false"]]) {
    known.push([title, (a, b) => sum(b, key) - sum(a, key)]);
  }
  known.push(["by id", (a, b) => a.id - b.id]);
  return known;
}

function listEntry(video) {
  const less = video.runs.map((run) =>
    `${TWO ? `${LETTERS[video.runs.indexOf(run)]}: ` : ""}${run.missed} missed \u00b7 ${run.false} false \u00b7 ${plural(run.switches, "switch").replace("switchs", "switches")}`);
  return el("li", null, el("button", {type: "button", "data-video": video.id, onclick: () => openVideo(video.id)},
    el("span", {class: "name"}, el("span", {title: video.name}, video.name), el("span", {class: "less"}, `#${video.id}`)),
    el("span", {class: "bars"}, ...video.runs.flatMap((run, index) => [
      el("span", {class: `bar run-${index}`}, el("i", {"width%": 100 * (run.quality || 0)})),
      el("span", {class: TWO ? `run-${index}` : null, title: "quality of the video, percent"}, percent(run.quality))])),
    ...less.map((line) => el("span", {class: "less"}, line, el("br")))));
}

let LISTED = [];

function drawList() {
  const [, compare] = orders()[byId("order").selectedIndex];
  const wanted = byId("search").value.trim().toLowerCase();
  LISTED = SUMMARY.videos.filter((video) => !wanted || video.name.toLowerCase().includes(wanted) || String(video.id) === wanted);
  LISTED.sort((a, b) => compare(a, b) || a.id - b.id);
  byId("video-list").replaceChildren(...LISTED.map(listEntry));
  markOpen(false);
}

function markOpen(scroll) {
  for (const button of byId("video-list").querySelectorAll("button")) {
    const current = PLAYER !== null && Number(button.dataset.video) === PLAYER.video.id;
    if (current) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
    if (current && scroll) bringInto(byId("video-list"), button);
  }
}

/** Scrolls a list, and nothing around it, until an entry is seen. */
function bringInto(list, entry) {
  const [frame, box] = [list.getBoundingClientRect(), entry.getBoundingClientRect()];
  if (box.top < frame.top) list.scrollTop -= frame.top - box.top + 4;
  if (box.bottom > frame.bottom) list.scrollTop += box.bottom - frame.bottom + 4;
}

function neighbour(step) {
  const at = LISTED.findIndex((video) => PLAYER !== null && video.id === PLAYER.video.id);
  const next = LISTED[Math.min(LISTED.length - 1, Math.max(0, at + step))];
  if (next && (PLAYER === null || next.id !== PLAYER.video.id)) openVideo(next.id);
}

// Help

function drawHelp() {
  byId("help-text").append(...SUMMARY.help.flatMap(([term, text]) => [el("dt", null, term), el("dd", null, text)]));
}
