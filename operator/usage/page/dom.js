// Elements. Whatever comes from the cluster goes in as text or as the value of an attribute, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

// el("a", {href: "#/", onclick: run, class: "x"}, "text", another): attributes that are null, undefined or false are left out.
export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else set(element, name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

// Only what changes: a screen reader need not read again what stayed.
export function set(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else {
    const text = value === true ? "" : String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
}

export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// A table whose cells know the name of their column: on a phone each row is a card.
export function table(caption, columns, rows) {
  const head = el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)));
  const body = rows.map((cells) => {
    const row = cells.map((cell, at) => {
      const value = (Array.isArray(cell) ? cell : [cell]).filter(Boolean);
      return at === 0
        ? el("th", { scope: "row" }, value)
        : el("td", { "data-label": columns[at] }, value);
    });
    return el("tr", {}, row);
  });
  return el("table", {}, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, body));
}

// A word with a mark before it, so that nobody needs its colour.
export function badge(kind, text, title) {
  const marks = { bad: "▲", warn: "◆", good: "●", idle: "○" };
  return el("span", { class: `badge ${kind}`, title }, el("span", { "aria-hidden": "true" }, `${marks[kind]} `), text);
}

export function notice(kind, ...text) {
  return el("p", { class: `notice ${kind}`, role: kind === "bad" ? "alert" : null }, text);
}

// Makes `old` look like `fresh`, element by element, so that focus, selection and what is unfolded stay where they are.
export function renew(old, fresh) {
  const same = old.nodeType === fresh.nodeType && old.nodeName === fresh.nodeName;
  if (!same) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (name !== "open" && !fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) set(old, name, value);
  const children = [...fresh.childNodes];
  while (old.childNodes.length > children.length) old.lastChild.remove();
  children.forEach((child, at) => {
    if (at < old.childNodes.length) renew(old.childNodes[at], child);
    else old.append(child);
  });
}

// The same for all that is in `box`.
export function show(box, ...children) {
  const fresh = box.cloneNode(false);
  fresh.append(...children.flat().filter(Boolean));
  renew(box, fresh);
}
