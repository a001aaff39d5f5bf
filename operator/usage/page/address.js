// One address: its slices, its nodes, and its use over time by origin.

import { ask, usage } from "./api.js";
import { badge, el, notice, say, set, show, table } from "./dom.js";
import { meter } from "./accounts.js";
import { RECENT, fullest, judge, lastOf } from "./fill.js";
import { count, isNetwork, letters, moment, number, origin, percent, ports, rfc3339, seconds } from "./format.js";
import { Plot, roof } from "./plot.js";
import { accounts } from "./session.js";
import { Strip, use } from "./strip.js";

const QUERY = `query($accounts: [String!]!, $ranges: [String!]!) {
  now
  addresses(accounts: $accounts, ranges: $ranges, first: 1) {
    address account allocation prefix epoch first last held draining quarantined targetPercent
    holders { node site held draining } slices { first last node site state until }
    conditions { type status reason message since } }
  reports(accounts: $accounts, ranges: $ranges) { node last }
}`;

const REPORTED = `query($accounts: [String!]!, $ranges: [String!]!, $nodes: [String!]!, $level: Level!, $from: Time!, $to: Time!, $step: Int!) {
  reported(accounts: $accounts, ranges: $ranges, nodes: $nodes, level: $level, from: $from, to: $to, step: $step) { at nodes seconds } }`;

// Length, level, step and how often to look again, in seconds.
const WINDOWS = {
  "10 min": { length: 600, level: "TENS", slot: 10, step: 10, every: 10 },
  "1 hour": { length: 3600, level: "TENS", slot: 10, step: 60, every: 10 },
  "1 day": { length: 86_400, level: "MINUTES", slot: 60, step: 900, every: 60 },
  "1 week": { length: 7 * 86_400, level: "HOURS", slot: 3600, step: 3600, every: 300 },
};

// What is plotted, and what each point of a plot is. A /64 has no ports: what tells of it is how many flows begin.
const PORTS = {
  figure: { measure: "IN_USE", aggregation: "MAX" }, unit: "ports", what: "Ports in use",
  points: { 10: "the mean of 10 seconds", 60: "the highest 10 seconds of a minute", 900: "the highest minute of a quarter of an hour", 3600: "an hour's mean" },
};
const FLOWS = {
  figure: { measure: "FLOWS", aggregation: "SUM" }, unit: "flows", what: "Flows that began",
  points: { 10: "those of 10 seconds", 60: "those of a minute", 900: "those of a quarter of an hour", 3600: "those of an hour" },
};
const plotted = (address) => isNetwork(address.address) ? FLOWS : PORTS;

// Reports of the last moments may still be on their way.
const LAG = 20;

const ORIGINS = 6;

export function view(box, name) {
  const chosen = { window: "10 min", node: "", origins: ORIGINS };
  const head = el("div", { class: "facts" });
  const nodes = el("div", { class: "scroll" });
  const node = el("select", { id: "node" }, el("option", { value: "" }, "all nodes"));
  const strip = new Strip((picked) => {
    node.value = picked;
    chosen.node = node.value;
    plot(true);
  });
  const slices = el("div", { class: "scroll few" });
  const plots = new Map();
  const figures = el("div", { class: "plots" });
  const trouble = el("div", {});
  const caption = el("p", { class: "quiet", id: "caption" });
  const more = el("button", { hidden: true, onclick: () => { chosen.origins += ORIGINS; plot(true); } }, "More origins");
  const windows = Object.keys(WINDOWS).map((text) => el(
    "label", {}, el("input", { type: "radio", name: "window", value: text, checked: text === chosen.window }), text));
  const choice = el("fieldset", {}, el("legend", {}, "Window"), windows);
  choice.addEventListener("change", (event) => { chosen.window = event.target.value; plot(true); });
  node.addEventListener("change", () => { chosen.node = node.value; plot(true); });
  const rest = el("div", { hidden: true },
    el("section", { "aria-labelledby": "h-slices" }, el("h2", { id: "h-slices" }, "Slices"), strip.element,
      el("details", { id: "as-table" }, el("summary", {}, "Slices as a table"), slices)),
    el("section", { "aria-labelledby": "h-nodes" }, el("h2", { id: "h-nodes" }, "Nodes"), nodes),
    el("section", { "aria-labelledby": "h-use" }, el("h2", { id: "h-use" }, "Use over time, by origin"),
      el("div", { class: "controls" }, choice, el("label", { for: "node" }, "Of ", node)), caption, trouble, figures, more));
  box.append(el("h1", { tabindex: "-1" }, name), head, rest);
  head.append(notice("idle", "Loading …"));

  let state = null;
  let drawn = { at: 0, busy: null };

  const refresh = async () => {
    const variables = { accounts: accounts(), ranges: [name] };
    const known = await ask(QUERY, variables);
    const now = seconds(known.now);
    const address = known.addresses[0];
    if (!address) {
      show(head, notice("bad", `There is no address ${name}, or it is not yours to see.`));
      set(rest, "hidden", true);
      return now;
    }
    const filter = { accounts: accounts(), addresses: [name] };
    let now_use = null;
    let failed = null;
    try {
      now_use = await fullest(now, filter);
    } catch (error) {
      if (error.refused) throw error;
      failed = error.message;
    }
    const holders = judge(address, lastOf(known.reports), now_use, now);
    holders.forEach((it, at) => { it.letter = letters(at); });
    state = { address, holders, now, filter };
    show(head, facts(address, now), failed ? notice("bad", `What is in use now is not known: ${failed}`) : null);
    set(rest, "hidden", false);
    strip.update(address, holders, now);
    show(nodes, holders.length > 0 ? nodeTable(address, holders, now) : notice("idle", "No node holds a slice."));
    show(slices, sliceTable(address, now));
    options(node, holders, chosen);
    await plot(false);
    return now;
  };

  // Draws the plots where it is time, or at once.
  async function plot(soon) {
    if (!state) return;
    const kind = WINDOWS[chosen.window];
    if (!soon && drawn.kind === kind && state.now - drawn.at < kind.every) return;
    const turn = { ...chosen };
    const mine = {};
    drawn = { at: state.now, kind, turn: mine };
    if (soon) set(figures, "aria-busy", "true");
    try {
      const found = await series(state, kind, turn);
      if (drawn.turn !== mine) return;
      show(trouble);
      paint(found, kind, turn);
    } catch (error) {
      if (drawn.turn !== mine) return;
      drawn.at = 0;
      show(trouble, notice("bad", `The plots are not current: ${error.message}`));
      if (error.refused) throw error;
    } finally {
      if (drawn.turn === mine) set(figures, "aria-busy", null);
    }
  }

  function paint({ top, points, from, to, hasMore }, kind, turn) {
    const { address, holders, now } = state;
    const own = holders.filter((it) => turn.node === "" || it.node === turn.node);
    const all = own.reduce((sum, it) => sum + (it.ports ?? 0), 0);
    const target = address.targetPercent;
    const value = target === null || all === 0 ? null : (all * target) / 100;
    const line = value === null ? null : { value, label: `planned: ${target} % of ${number(all)} = ${number(Math.floor(value))}` };
    const highest = Math.max(0, ...top.flatMap(({ key }) => points.get(key).map((it) => it.value ?? 0)));
    const max = roof(highest, value);
    const of = turn.node || "all nodes together";
    const plan = isNetwork(address.address) ? "Ports do not limit a /64." : value === null ? "Nothing is planned." : "";
    const { unit, what, points: each } = plotted(address);
    say(caption, `${what} of ${of}; each point is ${each[kind.step]}. ${plan}`);
    const keys = top.map((it) => it.key);
    for (const [key, it] of plots) {
      if (!keys.includes(key)) {
        it.element.remove();
        plots.delete(key);
      }
    }
    top.forEach(({ key, title }, at) => {
      let it = plots.get(key);
      if (!it) {
        it = new Plot();
        plots.set(key, it);
      }
      if (figures.children[at] !== it.element) figures.insertBefore(it.element, figures.children[at] ?? null);
      set(it.element, "data-key", key);
      it.update({ title, points: points.get(key), from, to, step: kind.step, what, unit, line, max, now });
    });
    set(more, "hidden", !hasMore);
    if (top.length === 0) show(trouble, notice("idle", "Nothing was in use in this time, as far as nodes reported."));
  }

  const resized = () => plots.forEach((it) => it.draw());
  addEventListener("resize", resized);
  return { title: name, refresh, close: () => removeEventListener("resize", resized) };
}

function facts(address, now) {
  const rows = [
    ["Account", `${address.account} / ${address.allocation}`],
    ["Prefix", address.prefix],
    ["Epoch", String(address.epoch)],
    ["Slices", `${address.held} held, ${address.draining} draining, ${address.quarantined} in quarantine`],
    ["Planned", address.targetPercent === null ? "the allocation is gone" : `${address.targetPercent} % of a node's ports`],
  ];
  const list = rows.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)));
  const conditions = address.conditions.map((it) => {
    const good = it.type === "CapacityLow" ? it.status !== "True" : it.status === "True";
    const since = it.since ? ` since ${moment(seconds(it.since), now)}` : "";
    return el("li", {}, badge(good ? "good" : "warn", `${it.type}: ${it.status}`), ` ${it.reason}${since}. ${it.message}`);
  });
  return [el("dl", {}, list), conditions.length > 0 ? el("ul", { class: "conditions" }, conditions) : null];
}

function nodeTable(address, holders, now) {
  const network = isNetwork(address.address);
  const columns = ["Node", "Site", "Slices", "In use towards the fullest origin", "Last report"];
  const rows = holders.map((it) => [
    [el("b", { class: "key" }, it.letter), it.node],
    it.site || "none",
    it.draining > 0 ? `${it.held} held, ${it.draining} draining` : `${it.held} held`,
    el("span", { class: "side" },
      it.share === null ? "" : meter(it.share, address.targetPercent),
      el("span", {}, it.silent ? badge("bad", use(it, network, now)) : use(it, network, now).replace(/^the node uses /, ""))),
    it.reported === null ? "none in 30 days" : it.silent ? moment(it.reported, now) : `within ${RECENT} s`,
  ]);
  return table("Nodes that hold slices", columns, rows);
}

function sliceTable(address, now) {
  const network = isNetwork(address.address);
  const rows = address.slices.map((it) => [
    it.first === it.last ? String(it.first) : `${it.first} to ${it.last}`,
    network ? "none" : ports(it.first, it.last),
    it.node,
    it.site || "none",
    it.state[0] + it.state.slice(1).toLowerCase() + (it.until ? ` until ${moment(seconds(it.until), now)}` : ""),
  ]);
  const taken = address.slices.reduce((sum, it) => sum + it.last + 1 - it.first, 0);
  const free = address.last + 1 - address.first - taken;
  return [
    table("Holders by slice", ["Slices", "Ports", "Node", "Site", "State"], rows),
    el("p", { class: "quiet" }, `${count(Math.max(free, 0), "slice")} free.`),
  ];
}

function options(select, holders, chosen) {
  const names = ["", ...holders.map((it) => it.node)];
  const old = [...select.options].map((it) => it.value);
  if (names.length === old.length && names.every((it, at) => it === old[at])) return;
  select.replaceChildren(...names.map((it) => el("option", { value: it }, it || "all nodes")));
  select.value = names.includes(chosen.node) ? chosen.node : "";
  chosen.node = select.value;
}

// Figures of the origins that had the most in the window, step by step.
async function series({ address, holders, now, filter }, kind, { node, origins }) {
  const to = Math.floor(now / kind.slot) * kind.slot;
  const from = Math.floor((to - kind.length) / kind.step) * kind.step;
  const window = { from: rfc3339(from), to: rfc3339(to), level: kind.level };
  const asked = { ...filter, nodes: node ? [node] : [] };
  const figures = [plotted(address).figure];
  const by = ["ORIGIN", "PROTOCOL"];
  const covered = { ...window, step: kind.step, accounts: filter.accounts, ranges: filter.addresses, nodes: asked.nodes };
  const [most, { reported }] = await Promise.all([
    usage({ ...window, filter: asked, by, figures, order: "HIGHEST", first: origins }),
    ask(REPORTED, covered),
  ]);
  const top = most.rows.map(({ by: [name, protocol] }) => ({ key: `${name} ${protocol}`, name, title: origin(name, protocol) }));
  const names = [...new Set(top.map((it) => it.name || "other"))];
  const all = names.length === 0
    ? { rows: [], until: most.until }
    : await usage({ ...window, step: kind.step, filter: { ...asked, origins: names }, by, figures });
  const found = new Map(all.rows.map(({ by: [name, protocol], at, figures: [value] }) => [`${name} ${protocol} ${seconds(at)}`, value]));
  const heard = new Map(reported.map((it) => [seconds(it.at), it]));
  const own = holders.filter((it) => node === "" || it.node === node).length;
  const made = kind.level === "TENS" ? now - LAG : Math.min(seconds(all.until), now - LAG);
  const points = new Map(top.map(({ key }) => [key, steps(key)]));
  function steps(key) {
    const list = [];
    for (let at = from; at < to; at += kind.step) {
      const value = found.get(`${key} ${at}`);
      const { nodes = 0, seconds: covers = 0 } = heard.get(at) ?? {};
      const whole = nodes >= own && covers >= own * kind.step * 0.9;
      const later = at + kind.step > made;
      const state = later ? "later" : nodes === 0 && value === undefined ? "none" : whole ? "" : "part";
      list.push({ at, state, value: value ?? (nodes === 0 ? null : 0) });
    }
    return list;
  }
  return { top, points, from, to: Math.max(to, from + kind.step), hasMore: most.more };
}
