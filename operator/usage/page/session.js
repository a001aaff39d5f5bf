// Whose token it is. It stays in this tab, and goes with it.

import { el, notice } from "./dom.js";
import { moment } from "./format.js";

const TOKEN = "aegis-token";
const ACCOUNTS = "aegis-accounts";

// The command as one can paste it; the chart's example of a role is in the documentation.
const COMMAND = "kubectl create token NAME -n NAMESPACE --audience aegis-collector";

export const token = () => sessionStorage.getItem(TOKEN);

// Accounts that somebody named because the collector does not find them by itself.
export const accounts = () => JSON.parse(sessionStorage.getItem(ACCOUNTS) ?? "[]");

export function keep(text, named) {
  sessionStorage.setItem(TOKEN, text);
  sessionStorage.setItem(ACCOUNTS, JSON.stringify(named));
}

export function forget() {
  sessionStorage.clear();
}

// What a token says of itself. Nothing depends on it: who somebody is, the collector asks the API server.
export function claims(text) {
  try {
    const part = text.split(".")[1].replace(/-/g, "+").replace(/_/g, "/");
    const bytes = Uint8Array.from(atob(part), (letter) => letter.charCodeAt(0));
    const { sub, exp } = JSON.parse(new TextDecoder().decode(bytes));
    return { name: typeof sub === "string" ? sub : "", end: typeof exp === "number" ? exp : null };
  } catch {
    return { name: "", end: null };
  }
}

// Why a token was refused, as far as it can be told from here.
export function why(text) {
  const { end } = claims(text);
  const now = Date.now() / 1000;
  if (end !== null && end < now) return `The token expired at ${moment(end, now)}. Make a new one.`;
  return "The token is refused: it is mistyped, expired, or not made for the audience aegis-collector.";
}

// The form. `enter(token, accounts)` says what is wrong, or nothing.
export function signIn(message, enter) {
  const field = el("input", {
    id: "token", type: "password", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": "how",
  });
  const named = el("input", { id: "named", autocomplete: "off", spellcheck: "false", "aria-describedby": "which" });
  const button = el("button", { class: "main" }, "Sign in");
  const said = el("div", { id: "said", role: "alert" });
  if (message) said.append(notice("bad", message));
  const copied = el("span", { role: "status" });
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(COMMAND);
      copied.textContent = " Copied.";
    } catch {
      copied.textContent = " Select it and copy it.";
    }
  };
  const submit = async (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (!text) return;
    button.disabled = true;
    said.replaceChildren();
    const wrong = await enter(text, named.value.split(/[\s,]+/).filter(Boolean));
    button.disabled = false;
    if (wrong) {
      said.replaceChildren(notice("bad", wrong));
      field.focus();
      field.select();
    }
  };
  return el(
    "section", { class: "sign" },
    el("h1", {}, "Sign in"),
    el("p", { id: "how" }, "Paste a Kubernetes token that is made for the collector:"),
    el("pre", {}, el("code", {}, COMMAND)),
    el("p", { class: "after" }, el("button", { type: "button", onclick: copy }, "Copy the command"), copied),
    el(
      "form", { onsubmit: submit },
      el("label", { for: "token" }, "Token"), field,
      el("label", { for: "named" }, "Accounts (optional)"), named,
      el("p", { id: "which", class: "quiet" }, "Namespaces, up to 20: only these are shown. For those that are not found by themselves."),
      said, button,
    ),
    el("p", { class: "quiet" },
      "The token stays in this tab: it is forgotten when you sign out or close it. You see the accounts in whose namespace you may ",
      el("code", {}, "get egressallocations/usage"), ", and the addresses of prefixes that they own."),
  );
}
