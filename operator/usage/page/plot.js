// One figure over time, as steps, with axes, the plan, and gaps where nobody reported.

import { el, say, set, svg } from "./dom.js";
import { moment, number } from "./format.js";

const HEIGHT = 150;
const LEFT = 46;
const RIGHT = 10;
const TOP = 16;
const BOTTOM = 20;

const TICKS = [10, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800];

let plots = 0;

export class Plot {
  constructor() {
    plots += 1;
    this.name = `plot-${plots}`;
    this.heading = el("h3", { id: this.name });
    this.sum = el("p", { class: "quiet", id: `${this.name}-sum` });
    this.svg = svg("svg", {
      class: "plot", role: "img", tabindex: "0", height: HEIGHT, "aria-labelledby": this.name, "aria-describedby": `${this.name}-sum`,
    });
    this.readout = el("output", {});
    this.numbers = el("details", {}, el("summary", {}, "Numbers"));
    this.element = el("figure", {}, this.heading, this.sum, this.svg, this.readout, this.numbers);
    this.cursor = null;
    this.numbers.addEventListener("toggle", () => this.list());
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.look(null));
    this.svg.addEventListener("focus", () => this.look(this.cursor ?? this.points.length - 1));
    this.svg.addEventListener("blur", () => this.look(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  // points: [{at, value, state}], one for each step; value null where nothing is known, state "", "part", "none" or "later".
  // what, unit: what is counted, and its short name. line: {value, label} of the plan, or null. max: end of the axis.
  update({ title, points, from, to, step, what, unit, line, max, now }) {
    Object.assign(this, { points, from, to, step, what, unit, line, max, now });
    say(this.heading, title);
    const known = points.filter((it) => it.value !== null);
    const highest = known.reduce((most, it) => Math.max(most, it.value), 0);
    // The newest step that could be there: of a node that is silent now, what it used before is not what it uses.
    const newest = points.findLast((it) => it.state !== "later") ?? points.at(-1);
    const current = newest.value === null ? "no report now" : `now ${number(newest.value)}`;
    const missing = points.filter((it) => it.state === "none").length;
    const words = known.length > 0 ? `${current}, highest ${number(highest)} ${unit}` : "no report in this time";
    const plan = line ? `; planned ${number(Math.floor(line.value))}` : "";
    say(this.sum, `${words}${plan}${missing > 0 ? `; ${missing} of ${points.length} steps without any report` : ""}`);
    this.draw();
    if (this.numbers.open) this.list();
  }

  draw() {
    const width = Math.max(this.svg.clientWidth || 0, 240);
    const inner = width - LEFT - RIGHT;
    const high = HEIGHT - TOP - BOTTOM;
    const x = (at) => LEFT + ((at - this.from) / (this.to - this.from)) * inner;
    const y = (value) => TOP + high - (value / this.max) * high;
    Object.assign(this, { x, inner });
    set(this.svg, "viewBox", `0 0 ${width} ${HEIGHT}`);
    // What a test reads the picture by.
    for (const [name, value] of Object.entries({ from: this.from, to: this.to, max: this.max, top: TOP, high, left: LEFT, inner })) {
      this.svg.dataset[name] = value;
    }
    const parts = [svg("defs", {}, svg(
      "pattern", { id: `${this.name}-gap`, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      svg("line", { class: "hatch", x1: 0, y1: 0, x2: 0, y2: 6 }),
    ))];
    for (const value of nice(this.max)) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
      parts.push(svg("text", { class: "axis", x: LEFT - 5, y: y(value) + 3.5, "text-anchor": "end" }, short(value)));
    }
    parts.push(svg("text", { class: "axis", x: 2, y: 10 }, this.unit));
    for (const { at, text } of times(this.from, this.to, inner)) {
      parts.push(svg("line", { class: "mark", x1: x(at), x2: x(at), y1: TOP + high, y2: TOP + high + 4 }));
      parts.push(svg("text", { class: "axis", x: x(at), y: HEIGHT - 4, "text-anchor": "middle" }, text));
    }
    parts.push(...this.gaps(x, high), ...this.steps(x, y, high));
    if (this.line && this.line.value <= this.max) {
      const at = y(this.line.value);
      parts.push(svg("line", { class: "plan", "data-value": this.line.value, x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
      parts.push(svg("text", { class: "plan", x: width - RIGHT, y: at - 4, "text-anchor": "end" }, this.line.label));
    }
    this.marker = svg("line", { class: "cursor", y1: TOP, y2: TOP + high });
    parts.push(this.marker);
    this.svg.replaceChildren(...parts);
    this.look(this.cursor);
  }

  // Steps of which nothing, or not all, is known, side by side as one.
  gaps(x, high) {
    const parts = [];
    let begin = null;
    this.points.forEach((it, at) => {
      const next = this.points[at + 1];
      if (it.state === "none" || it.state === "part") {
        begin ??= it.at;
        if (next?.state !== it.state) {
          const box = { x: x(begin), width: x(it.at + this.step) - x(begin), y: TOP, height: high };
          parts.push(svg("rect", { class: `gap ${it.state}`, fill: `url(#${this.name}-gap)`, ...box }));
          if (it.state === "none" && box.width > 54) {
            parts.push(svg("text", { class: "axis", x: box.x + box.width / 2, y: TOP + high / 2, "text-anchor": "middle" }, "no report"));
          }
          begin = null;
        }
      }
    });
    return parts;
  }

  steps(x, y, high) {
    const parts = [];
    let run = [];
    const end = () => {
      if (run.length > 0) {
        const path = run.map(({ at, value }, index) =>
          `${index === 0 ? "M" : "L"}${x(at).toFixed(1)} ${y(value).toFixed(1)}H${x(at + this.step).toFixed(1)}`).join("");
        const base = (TOP + high).toFixed(1);
        const last = run.at(-1).at + this.step;
        parts.push(svg("path", { class: "area", d: `${path}V${base}H${x(run[0].at).toFixed(1)}Z`, "data-until": last }));
        parts.push(svg("path", { class: "line", d: path }));
      }
      run = [];
    };
    for (const it of this.points) {
      if (it.value === null) end();
      else run.push(it);
    }
    end();
    return parts;
  }

  point(offset) {
    const at = Math.floor(((offset - LEFT) / this.inner) * this.points.length);
    this.look(at >= 0 && at < this.points.length ? at : null);
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    const at = this.cursor ?? this.points.length - 1;
    if (event.key in steps) this.look(Math.min(Math.max(at + steps[event.key], 0), this.points.length - 1));
    else if (event.key === "Home") this.look(0);
    else if (event.key === "End") this.look(this.points.length - 1);
    else return;
    event.preventDefault();
  }

  look(at) {
    const point = at === null ? undefined : this.points[at];
    this.cursor = point ? at : null;
    if (point) {
      const place = this.x(point.at + this.step / 2);
      set(this.marker, "x1", place);
      set(this.marker, "x2", place);
    }
    set(this.marker, "visibility", point ? null : "hidden");
    say(this.readout, point ? `${moment(point.at, this.now)}: ${told(point)}` : "");
  }

  list() {
    if (!this.numbers.open) return;
    const rows = this.points.map((it) => el("tr", { "data-at": it.at, "data-value": it.value ?? "" },
      el("th", { scope: "row" }, moment(it.at, this.now)), el("td", {}, told(it))));
    const head = el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Time"), el("th", { scope: "col" }, this.what)));
    const body = el("tbody", {}, rows);
    const all = el("div", { class: "scroll few", tabindex: "0", role: "group", "aria-label": "Numbers" }, el("table", {}, head, body));
    this.numbers.replaceChildren(this.numbers.firstElementChild, all);
  }
}

function told({ value, state }) {
  if (state === "later") return value === null ? "not there yet" : `${number(value)} so far`;
  if (state === "none") return "no report";
  return state === "part" ? `${number(value)} of the nodes that reported; not all did` : number(value);
}

// Where the axis ends, so that the highest figure and the plan have room.
export function roof(highest, plan) {
  return Math.max(highest, plan ?? 0, 4) * 1.12;
}

// Up to four round numbers.
function nice(max) {
  const rough = max / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((it) => it * power).find((it) => it >= rough && it >= 1) ?? power * 10;
  const values = [];
  for (let value = 0; value <= max; value += step) values.push(value);
  return values;
}

function short(value) {
  return value >= 10_000 ? `${number(value / 1000)}k` : number(value);
}

// Marks at round times of the day, as many as there is room for.
function times(from, to, width) {
  const most = Math.max(Math.floor(width / 70), 2);
  const step = TICKS.find((it) => (to - from) / it <= most) ?? TICKS.at(-1);
  const zone = new Date(from * 1000).getTimezoneOffset() * 60;
  const marks = [];
  for (let at = Math.ceil((from - zone) / step) * step + zone; at < to; at += step) {
    const date = new Date(at * 1000);
    const text = step >= 86_400
      ? date.toLocaleDateString("en-CA").slice(5)
      : date.toLocaleTimeString("en-GB").slice(0, step < 60 ? 8 : 5);
    marks.push({ at, text });
  }
  return marks;
}
