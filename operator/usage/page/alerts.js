// Alerts, where the collector keeps some, and conditions of allocations that ask for attention.

import { ask } from "./api.js";
import { badge, el, notice, show, table } from "./dom.js";
import { seconds } from "./format.js";
import { accounts } from "./session.js";

const CONDITIONS = `query($accounts: [String!]!) { now allocations(accounts: $accounts) {
  account name conditions { type status reason message } } }`;

const NAMED = "name type { name kind ofType { name kind ofType { name kind ofType { name kind } } } }";

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
      show(alerts, shape ? await list(shape) : notice("idle", "None: this collector keeps no alerts."));
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

const last = (type) => {
  let it = type;
  while (it.ofType) it = it.ofType;
  return it;
};

const simple = (fields) => fields.filter(({ type }) => ["SCALAR", "ENUM"].includes(last(type).kind)).map((it) => it.name);

// Which fields alerts have, if this collector has any; null where it has none.
async function detect() {
  const of = async (name) => (await ask(`query($name: String!) { __type(name: $name) { fields { ${NAMED} } } }`, { name })).__type?.fields ?? [];
  const field = (await of("Query")).find((it) => it.name === "alerts");
  if (!field) return null;
  let fields = await of(last(field.type).name);
  const nodes = fields.find((it) => it.name === "nodes");
  if (nodes) fields = await of(last(nodes.type).name);
  return { paged: Boolean(nodes), names: simple(fields) };
}

async function list({ paged, names }) {
  const selected = names.join(" ");
  const { alerts } = await ask(`{ alerts { ${paged ? `nodes { ${selected} }` : selected} } }`);
  const rows = paged ? alerts.nodes : alerts;
  if (rows.length === 0) return notice("good", "None.");
  const first = ["severity", "state", "name", "title", "summary"].filter((it) => names.includes(it));
  const order = [...first, ...names.filter((it) => !first.includes(it))];
  const shown = (value) => (Array.isArray(value) ? value.join(", ") : value === null ? "none" : String(value));
  return table("Alerts", order.map(words), rows.map((row) => order.map((name) => shown(row[name]))));
}

// targetPercent: target percent
const words = (name) => name.replace(/([A-Z])/g, (letter) => ` ${letter.toLowerCase()}`);
