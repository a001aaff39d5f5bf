// What is shown, and how often it is looked at again.

import { view as accounts } from "./accounts.js";
import { view as address } from "./address.js";
import { view as alerts } from "./alerts.js";
import { ask } from "./api.js";
import { el, notice, say, set, show } from "./dom.js";
import { moment } from "./format.js";
import { view as policies } from "./policies.js";
import { claims, forget, keep, signIn, token, why } from "./session.js";

const VIEWS = { accounts, address, alerts, policies };
const EVERY = 10_000;

const main = document.getElementById("main");
const nav = document.getElementById("views");
const out = document.getElementById("out");
const who = document.getElementById("who");
const live = document.getElementById("live");
const trouble = el("div", { id: "trouble" });

let current = null;
let timer = 0;

function route() {
  const [name, ...rest] = location.hash.replace(/^#\//, "").split("/");
  try {
    return { name: name in VIEWS ? name : "accounts", rest: decodeURIComponent(rest.join("/")) };
  } catch {
    return { name: "accounts", rest: "" };
  }
}

function leave() {
  clearTimeout(timer);
  current?.close?.();
  current = null;
}

function open(message, moved) {
  leave();
  const signed = token() !== null;
  set(nav, "hidden", !signed);
  set(out, "hidden", !signed);
  say(who, signed ? claims(token()).name : "");
  say(live, "");
  if (!signed) {
    document.title = "Sign in · Aegis";
    main.replaceChildren(signIn(message, enter));
    document.getElementById("token").focus();
    return;
  }
  const { name, rest } = route();
  for (const link of nav.children) {
    const here = link.hash === `#/${name}` || (name === "address" && link.hash === "#/accounts");
    set(link, "aria-current", here ? "page" : null);
  }
  const box = el("div", {});
  main.replaceChildren(trouble, box);
  show(trouble);
  current = VIEWS[name](box, rest);
  document.title = `${current.title} · Aegis`;
  // Whoever followed a link reads on from the heading.
  if (moved) box.querySelector("h1").focus();
  look();
}

async function look() {
  const mine = current;
  clearTimeout(timer);
  try {
    const now = await mine.refresh();
    if (mine !== current) return;
    mine.seen = now;
    show(trouble);
    say(live, `Live: as of ${moment(now)}, looked at every ${EVERY / 1000} s. Times are of this device's zone.`);
  } catch (error) {
    if (mine !== current) return;
    if (error.refused) {
      const message = why(token());
      forget();
      open(message);
      return;
    }
    if (!error.message.startsWith("The collector")) console.error(error);
    const since = mine.seen === undefined ? "Nothing is shown yet." : `What is shown is of ${moment(mine.seen)}.`;
    show(trouble, notice("bad", `${error.message} ${since}`));
    say(live, "Not live. Trying again.");
  }
  if (!document.hidden) timer = setTimeout(look, EVERY);
}

// Tries a token; says what is wrong with it.
async function enter(text, named) {
  try {
    await ask("{ __typename }", {}, text);
  } catch (error) {
    return error.refused ? why(text) : error.message;
  }
  keep(text, named);
  open(null, true);
  return null;
}

out.addEventListener("click", () => {
  forget();
  open();
});
document.getElementById("skip").addEventListener("click", () => main.focus());
addEventListener("hashchange", () => open(null, true));
// Nobody looks at a hidden tab, so it asks nothing.
document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden && current) look();
});
open();
