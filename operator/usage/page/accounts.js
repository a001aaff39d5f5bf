// Addresses of all accounts that one may see, the fullest first.

import { ask } from "./api.js";
import { badge, el, notice, show, svg, table } from "./dom.js";
import { fullest, grade, judge, lastOf, silence } from "./fill.js";
import { count, isNetwork, moment, number, origin, percent, seconds } from "./format.js";
import { accounts } from "./session.js";

const QUERY = `query($accounts: [String!]!, $after: String, $place: String) {
  now
  allocations(accounts: $accounts, first: 1000, after: $place) { account name addresses targetPercent conditions { type status reason message } }
  addresses(accounts: $accounts, first: 500, after: $after) {
    address account allocation held draining quarantined first last targetPercent
    holders { node site held draining } conditions { type status reason message } }
  reports(accounts: $accounts) { node last }
}`;

// More than a cluster has.
const PAGES = 4;

// Rows that are shown; a filter finds the others.
const ROWS = 200;

async function objects() {
  let all = null;
  for (let page = 0; page < PAGES; page += 1) {
    const after = all?.addresses.at(-1)?.address ?? null;
    const last = all?.allocations.at(-1);
    const part = await ask(QUERY, { accounts: accounts(), after, place: last ? `${last.account}/${last.name}` : null });
    all = {
      ...part,
      allocations: [...(all?.allocations ?? []), ...part.allocations],
      addresses: [...(all?.addresses ?? []), ...part.addresses],
    };
    if (part.addresses.length < 500 && part.allocations.length < 1000) break;
  }
  return all;
}

export function view(box) {
  const filter = el("input", { id: "filter", type: "search", autocomplete: "off", spellcheck: "false" });
  const sum = el("p", { id: "sum" });
  const list = el("div", { id: "list", class: "scroll" });
  let state = null;
  const draw = () => state && paint(state, filter.value.trim().toLowerCase(), sum, list);
  filter.addEventListener("input", draw);
  box.append(
    el("h1", { tabindex: "-1" }, "Addresses"),
    sum,
    el("p", { class: "controls" }, el("label", { for: "filter" }, "Filter "), filter),
    list,
  );
  list.append(notice("idle", "Loading …"));
  const refresh = async () => {
    const known = await objects();
    const now = seconds(known.now);
    let use = null;
    let trouble = null;
    try {
      use = await fullest(now, { accounts: accounts() });
    } catch (error) {
      if (error.refused) throw error;
      trouble = error.message;
    }
    const last = lastOf(known.reports);
    const rows = known.addresses.map((address) => summary(address, judge(address, last, use, now)));
    state = { known, rows, now, trouble };
    draw();
    return now;
  };
  return { title: "Addresses", refresh };
}

function summary(address, holders) {
  const known = holders.filter((it) => it.share !== null);
  const worst = known.reduce((most, it) => (most === null || it.share > most.share ? it : most), null);
  const low = address.conditions.find((it) => it.type === "CapacityLow");
  return { address, holders, worst, low, silent: holders.filter((it) => it.silent) };
}

function paint({ known, rows, now, trouble }, words, sum, list) {
  const owners = new Set([...known.allocations, ...known.addresses].map((it) => it.account));
  const over = rows.filter(({ address, worst }) => ["over", "full"].includes(grade(worst?.share, address.targetPercent)));
  const silent = new Set(rows.flatMap((row) => row.silent.map((it) => it.node)));
  show(sum, [
    count(owners.size, "account"), ", ", count(rows.length, "address", "addresses"), ", ",
    over.length > 0 ? badge("warn", `${over.length} above the plan`) : "none above the plan",
    silent.size > 0 ? ", " : "", silent.size > 0 ? badge("bad", `${count(silent.size, "node")} silent`) : "", ".",
  ].filter(Boolean).map(text));
  const fits = ({ account, allocation, name, address = "" }) =>
    `${account}/${allocation ?? name} ${address}`.toLowerCase().includes(words);
  const without = known.allocations.filter((it) => it.addresses.length === 0 && fits(it));
  const shown = rows.filter(({ address }) => fits(address));
  shown.sort((a, b) => (b.worst?.share ?? -1) - (a.worst?.share ?? -1));
  const parts = [];
  if (trouble) parts.push(notice("bad", `How full they are is not known: ${trouble}`));
  if (known.allocations.length + known.addresses.length === 0) {
    parts.push(notice("idle", "There is no account with addresses that you may see. Ask for get on egressallocations/usage (role aegis-viewer)",
      " in a namespace, or name accounts when you sign in."));
  } else if (shown.length + without.length === 0) {
    parts.push(notice("idle", words ? "Nothing has these words." : "No address is set aside yet."));
  }
  if (shown.length > 0) {
    const columns = ["Address", "Account", "Fullest node", "Slices", "Nodes", "State"];
    parts.push(table("Addresses, the fullest first", columns, shown.slice(0, ROWS).map((row) => cells(row, now))));
  }
  if (shown.length > ROWS) parts.push(notice("idle", `${shown.length - ROWS} more: filter for them.`));
  if (without.length > 0) {
    const columns = ["Allocation", "Account", "Why"];
    parts.push(table("Allocations without an address", columns, without.map((it) => [it.name, it.account, whyNot(it)])));
  }
  show(list, parts);
}

const text = (it) => (typeof it === "string" ? document.createTextNode(it) : it);

function cells(row, now) {
  const { address } = row;
  const network = isNetwork(address.address);
  const link = el("a", { href: `#/address/${encodeURIComponent(address.address)}` }, address.address);
  const free = address.last - address.first + 1 - address.held - address.draining - address.quarantined;
  const slices = `${address.held} held, ${Math.max(free, 0)} free`;
  return [
    link, `${address.account} / ${address.allocation}`, network ? "no ports to share" : fill(row, now), slices,
    String(address.holders.length), states(row),
  ];
}

function fill({ address, holders, worst, silent }, now) {
  const told = silent.map((it) => el("span", { class: "line" }, badge("bad", `${it.node}: ${silence(it.reported, (at) => moment(at, now))}`)));
  const few = told.length > 3 ? [...told.slice(0, 2), el("span", { class: "line" }, badge("bad", `${told.length - 2} more are silent`))] : told;
  if (holders.length === 0) return "no node";
  if (worst === null) return few.length > 0 ? few : "not known";
  const words = worst.atMost
    ? `at most ${number(worst.atMost)} of ${number(worst.ports)} ports`
    : `${number(worst.inUse)} of ${number(worst.ports)} ports`;
  return [
    meter(worst.share, address.targetPercent),
    el("span", { class: "line" }, el("strong", {}, percent(worst.share)), ` ${words}, ${worst.node}`),
    worst.origin ? el("span", { class: "line quiet" }, `to ${origin(worst.origin.origin, worst.origin.protocol)}`) : "",
    ...few,
  ];
}

// A bar with a tick where the plan ends. What it says, the text beside it says, too.
export function meter(share, target) {
  const at = (value) => `${Math.min(value, 1) * 100}%`;
  return svg(
    "svg", { class: `meter ${grade(share, target)}`, "aria-hidden": "true", focusable: "false" },
    svg("rect", { class: "ground", width: "100%", height: "100%" }),
    svg("rect", { class: "level", width: at(share), height: "100%" }),
    target === null ? null : svg("line", { class: "tick", x1: at(target / 100), x2: at(target / 100), y1: "0", y2: "100%" }),
  );
}

function states({ address, worst, low }) {
  const found = [];
  const grades = { full: ["bad", "full"], over: ["warn", `above ${address.targetPercent} %`] };
  const own = grades[grade(worst?.share, address.targetPercent)];
  if (own) found.push(badge(...own));
  if (low?.status === "True") found.push(badge("warn", `CapacityLow: ${low.reason}`, low.message));
  for (const it of address.conditions) {
    if (it.type !== "CapacityLow" && it.status !== "True") found.push(badge("warn", `${it.type}: ${it.reason}`, it.message));
  }
  return found.length > 0 ? found.map((it) => el("span", { class: "line" }, it)) : badge("good", "as planned");
}

function whyNot({ conditions }) {
  const bad = conditions.filter((it) => it.status !== "True" && ["Accepted", "Delegated", "Allocated"].includes(it.type));
  if (bad.length === 0) return "nothing is said yet";
  return bad.map((it) => el("span", { class: "line" }, badge("bad", `${it.type}: ${it.reason}`), ` ${it.message}`));
}
