// The 252 slices of an address, one cell each: who holds it (letter), how full that node is (height and colour), and in which state it is (pattern).

import { el, say, set } from "./dom.js";
import { grade, silence } from "./fill.js";
import { isNetwork, moment, number, origin, percent, ports, seconds } from "./format.js";

const FIRST = 4;
const LAST = 255;

// A list of options that one walks through by arrows. `pick(node)` is called where somebody chooses a cell.
export class Strip {
  constructor(pick) {
    this.cells = [];
    this.texts = [];
    this.at = 0;
    this.list = el("div", { class: "strip", role: "listbox", "aria-label": "Slices 4 to 255", "aria-describedby": "keys" });
    for (let slice = FIRST; slice <= LAST; slice += 1) {
      const level = el("i", {});
      const letter = el("b", {});
      const cell = el("div", { role: "option", tabindex: slice === FIRST ? "0" : "-1", "aria-selected": "false", "data-slice": slice }, level, letter);
      this.cells.push({ cell, level, letter });
      this.list.append(cell);
    }
    this.details = el("p", { class: "details", id: "slice" }, "Choose a slice.");
    const keys = el("p", { id: "keys", class: "quiet" },
      "Arrows, Home and End go from slice to slice, Page Up and Page Down from holder to holder; Enter plots the node.");
    this.legend = el("ul", { class: "legend", "aria-label": "What the cells mean" }, LEGEND.map(([kind, text]) =>
      el("li", {}, el("span", { class: `cell ${kind}`, "aria-hidden": "true" }, el("i", {}), el("b", {})), text)));
    this.element = el("div", {}, this.list, this.details, this.legend, keys);
    this.list.addEventListener("keydown", (event) => this.key(event, pick));
    this.list.addEventListener("focusin", (event) => this.look(this.find(event.target)));
    this.list.addEventListener("pointerover", (event) => this.describe(this.find(event.target)));
    this.list.addEventListener("pointerleave", () => this.describe(this.at));
    this.list.addEventListener("click", (event) => {
      const at = this.find(event.target);
      if (at < 0) return;
      this.go(at);
      this.choose(pick);
    });
  }

  // Shows what is known: cells that stay the same are left alone.
  update(address, holders, now) {
    const network = isNetwork(address.address);
    const nodes = new Map(holders.map((it) => [it.node, it]));
    this.runs = new Array(LAST - FIRST + 1).fill(null);
    for (const run of address.slices) {
      for (let slice = run.first; slice <= run.last; slice += 1) this.runs[slice - FIRST] = run;
    }
    this.cells.forEach(({ cell, level, letter }, at) => {
      const slice = at + FIRST;
      const run = this.runs[at];
      const used = slice >= address.first && slice <= address.last;
      const holder = run && nodes.get(run.node);
      const kind = kindOf(run, holder, used, address.targetPercent);
      const begins = run !== null && run !== this.runs[at - 1];
      set(cell, "class", `cell ${kind}${begins ? " begins" : ""}`);
      set(cell, "data-node", run?.node);
      say(letter, run ? holder?.letter ?? "·" : "");
      const height = run && run.state !== "QUARANTINED" && holder?.share ? Math.min(holder.share, 1) : 0;
      level.style.height = `${Math.round(height * 100)}%`;
      this.texts[at] = describe({ slice, run, holder, used, network, now });
      set(cell, "aria-label", this.texts[at]);
    });
    this.describe(this.at);
  }

  find(target) {
    return this.cells.findIndex(({ cell }) => cell.contains(target));
  }

  key(event, pick) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const columns = getComputedStyle(this.list).gridTemplateColumns.split(" ").length;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    const { key } = event;
    if (key in steps) this.go(this.at + steps[key]);
    else if (key === "Home") this.go(0);
    else if (key === "End") this.go(this.cells.length - 1);
    else if (key === "PageDown") this.go(this.jump(1));
    else if (key === "PageUp") this.go(this.jump(-1));
    else if (key === "Enter" || key === " ") this.choose(pick);
    else return;
    event.preventDefault();
  }

  // Begin of the next run of slices of one holder, or of this one or the one before.
  jump(step) {
    const same = (a, b) => (this.runs?.[a] ?? null) === (this.runs?.[b] ?? null);
    let at = this.at + step;
    if (step > 0) while (at < this.cells.length && same(at, this.at)) at += 1;
    else while (at > 0 && same(at, at - 1)) at -= 1;
    return at;
  }

  go(at) {
    if (at < 0 || at >= this.cells.length) return;
    this.look(at);
    this.cells[at].cell.focus();
  }

  look(at) {
    if (at < 0) return;
    set(this.cells[this.at].cell, "tabindex", "-1");
    this.at = at;
    set(this.cells[at].cell, "tabindex", "0");
    this.describe(at);
  }

  choose(pick) {
    const node = this.runs?.[this.at]?.node;
    for (const { cell } of this.cells) set(cell, "aria-selected", "false");
    set(this.cells[this.at].cell, "aria-selected", "true");
    if (node) pick(node);
  }

  describe(at) {
    if (this.texts[at]) say(this.details, `${this.texts[at]}.`);
  }
}

const LEGEND = [
  ["free", "free"],
  ["held idle", "held, nothing in use"],
  ["held under", "held, filled to the height"],
  ["held over", "above the plan"],
  ["held full", "full"],
  ["draining idle", "draining: no new flows"],
  ["quarantined", "quarantined: nobody sends"],
  ["held unknown", "its node does not report"],
  ["unused", "not used by the allocation"],
];

function kindOf(run, holder, used, target) {
  if (!run) return used ? "free" : "unused";
  if (run.state === "QUARANTINED") return "quarantined";
  const state = run.state === "DRAINING" ? "draining" : "held";
  if (!holder || holder.silent || holder.inUse === null) return `${state} unknown`;
  return `${state} ${holder.ports === null ? "plain" : grade(holder.share, target)}`;
}

function describe({ slice, run, holder, used, network, now }) {
  const name = network ? `Slice ${slice}: number of a node` : `Slice ${slice}, ports ${ports(slice, slice)}`;
  if (!run) return `${name}: ${used ? "free" : "not used by the allocation"}`;
  const of = run.site ? `${run.node} of site ${run.site}` : run.node;
  if (run.state === "QUARANTINED") {
    const until = run.until ? ` until ${moment(seconds(run.until), now)}` : "";
    return `${name}: quarantined${until}, last held by ${of}`;
  }
  const state = run.state === "DRAINING" ? `draining, by ${of}` : `held by ${of}`;
  return `${name}: ${state}; ${use(holder, network, now)}`;
}

// What a node does with all of its slices of the address.
export function use(holder, network, now) {
  if (!holder) return "nothing is known of the node";
  if (holder.silent) return silence(holder.reported, (at) => moment(at, now));
  if (network) return "ports do not limit it";
  if (holder.inUse === null) return "use is not known";
  if (holder.inUse === 0 && !holder.atMost) return `the node uses none of its ${number(holder.ports)} ports`;
  const most = holder.atMost ? `at most ${number(holder.atMost)}` : number(holder.inUse);
  const to = holder.origin ? ` towards ${origin(holder.origin.origin, holder.origin.protocol)}` : "";
  const share = holder.atMost ? "" : ` (${percent(holder.share)})`;
  return `the node uses ${most} of its ${number(holder.ports)} ports${to}${share}`;
}
