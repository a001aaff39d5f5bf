// Policies, in the order in which they are asked.

import { ask } from "./api.js";
import { badge, el, notice, show, table } from "./dom.js";
import { count, number, seconds } from "./format.js";
import { accounts } from "./session.js";

const QUERY = `query($accounts: [String!]!) { now policies(accounts: $accounts) {
  order name precedence action observes egress accounts pods destinations matched conditions { type status reason message } } }`;

// Policies of an answer, of which one sees no more here.
const MOST = 1000;

export function view(box) {
  const list = el("div", { id: "policies", class: "scroll" }, notice("idle", "Loading …"));
  box.append(
    el("h1", { tabindex: "-1" }, "Policies"),
    el("p", {}, "They are asked from the top: the first that matches decides. What none of them matches is left to the accounts' zone bindings."),
    list,
  );
  const refresh = async () => {
    const { now, policies } = await ask(QUERY, { accounts: accounts() });
    const columns = ["Policy", "Place", "Does", "For pods of", "Towards", "State"];
    show(list, policies.length > 0
      ? [table("Policies in their order", columns, policies.map(cells)),
        policies.length < MOST ? null : notice("idle", `The first ${number(MOST)}; there may be more.`)]
      : notice("idle", "There is no policy, or none that names your accounts. Those for everybody are the platform's to see."));
    return seconds(now);
  };
  return { title: "Policies", refresh };
}

function cells(it) {
  const named = it.accounts.length > 0 ? it.accounts.join(", ") : "any account";
  return [
    it.name,
    [String(it.order), el("span", { class: "line quiet" }, `precedence ${it.precedence}`)],
    [does(it), it.observes ? el("span", { class: "line" }, badge("idle", "only counts")) : ""],
    [named, it.pods ? el("span", { class: "line quiet" }, it.pods) : "",
      it.matched === null ? "" : el("span", { class: "line quiet" }, `${count(it.matched, "pod")} now`)],
    it.destinations || "everything outside",
    it.conditions.length > 0 ? it.conditions.map(condition) : "nothing is said yet",
  ];
}

function does({ action, egress }) {
  if (action === "Deny") return "refuses";
  if (action === "Default") return "lets leave with the node's address";
  return `lets leave from ${egress.join(", else ")}`;
}

function condition({ type, status, reason, message }) {
  const kind = status === "True" ? "good" : status === "False" ? "bad" : "idle";
  return el("span", { class: "line" }, badge(kind, status === "True" ? type : `${type}: ${reason}`), message && status !== "True" ? ` ${message}` : "");
}
