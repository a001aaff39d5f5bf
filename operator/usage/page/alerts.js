// Alerts, where the collector keeps some, and conditions of allocations that ask for attention.

import { ask } from "./api.js";
import { badge, el, notice, show, table } from "./dom.js";
import { count, moment, number, origin, seconds } from "./format.js";
import { accounts } from "./session.js";

const CONDITIONS = `query($accounts: [String!]!) { now allocations(accounts: $accounts) {
  account name conditions { type status reason message } } }`;

// What is shown of an alert. A collector of another version may have fewer of these, or no alerts at all.
const FIELDS = ["alert", "account", "allocation", "kind", "address", "origin", "protocol", "reason", "site", "since", "raised", "figure", "highest", "silentNodes"];

// Rows of an answer, of which one sees no more here.
const MOST = 1000;

const SHAPE = "query($name: String!) { __type(name: $name) { fields { name type { name ofType { name ofType { name ofType { name } } } } } } }";

// Conditions that are bad when they hold.
const BAD_WHEN_TRUE = ["CapacityLow"];

export function view(box) {
  const alerts = el("div", { id: "alerts", class: "scroll" }, notice("idle", "Loading …"));
  const conditions = el("div", { id: "conditions", class: "scroll" }, notice("idle", "Loading …"));
  box.append(
    el("h1", { tabindex: "-1" }, "Alerts"), alerts,
    el("h2", {}, "Conditions that ask for attention"), conditions,
  );
  let shape;
  const refresh = async () => {
    const { now, allocations } = await ask(CONDITIONS, { accounts: accounts() });
    const bad = allocations.flatMap((it) => it.conditions.filter(asks).map((condition) => [it, condition]));
    const columns = ["Allocation", "Account", "Condition", "What it says"];
    show(conditions, bad.length > 0
      ? table("Conditions of allocations", columns, bad.map(([{ account, name }, it]) =>
        [name, account, badge("warn", `${it.type}: ${it.reason}`), it.message]))
      : notice("good", "None: all allocations that you may see are as they should be."));
    try {
      shape ??= await detect();
      show(alerts, shape ? await list(shape, seconds(now)) : notice("idle", "None: this collector keeps no alerts."));
    } catch (error) {
      if (error.refused) throw error;
      show(alerts, notice("bad", `Alerts are not known: ${error.message}`));
    }
    return seconds(now);
  };
  return { title: "Alerts", refresh };
}

function asks({ type, status }) {
  return BAD_WHEN_TRUE.includes(type) ? status === "True" : status !== "True";
}

// Which of the fields alerts have; null where there are none.
async function detect() {
  const fields = async (name) => (await ask(SHAPE, { name })).__type?.fields ?? [];
  const found = (await fields("Query")).find((it) => it.name === "alerts");
  if (!found) return null;
  let { type } = found;
  while (type.ofType) type = type.ofType;
  const names = (await fields(type.name)).map((it) => it.name);
  return FIELDS.filter((name) => names.includes(name));
}

async function list(names, now) {
  const query = `query($accounts: [String!]!) { alerts(accounts: $accounts, first: ${MOST}) { ${names.join(" ")} } }`;
  const { alerts } = await ask(query, { accounts: accounts() });
  if (alerts.length === 0) return notice("good", "None: nothing exceeds the limits of an alert.");
  // Those that were raised first, then the oldest first.
  alerts.sort((a, b) => Number(!a.raised) - Number(!b.raised) || (a.since < b.since ? -1 : 1));
  const all = table("What exceeds the limits of alerts", ["Alert", "Allocation", "State", "What", "Figure"], alerts.map((it) => cells(it, now)));
  return alerts.length < MOST ? all : [notice("idle", `The first ${number(MOST)}, by account; there may be more.`), all];
}

function cells(it, now) {
  const at = (text) => moment(seconds(text), now);
  const state = it.raised ? badge("bad", `raised at ${at(it.raised)}`) : badge("warn", "not raised yet");
  const silent = it.silentNodes > 0 ? badge("bad", `${count(it.silentNodes, "node")} silent: it may be more, and is not cleared`) : null;
  const about = [it.address, it.origin && `to ${origin(it.origin, (it.protocol ?? "").toLowerCase())}`, it.reason, it.site && `site ${it.site}`];
  return [
    it.alert ?? "alert",
    `${it.account} / ${it.allocation}`,
    [state, silent && el("span", { class: "line" }, silent), it.since ? el("span", { class: "line quiet" }, `since ${at(it.since)}`) : ""],
    [(it.kind ?? "").toLowerCase().replaceAll("_", " "), el("span", { class: "line quiet" }, about.filter(Boolean).join(" "))],
    it.figure === undefined ? "" : `${number(it.figure)} now, ${number(it.highest ?? it.figure)} at the most`,
  ];
}
