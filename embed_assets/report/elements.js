"use strict";
// Elements, numbers and tables. Texts are only ever written as text.

const SVG = "http://www.w3.org/2000/svg";

/** An element, as in `el("p.hint", { title: "…" }, child, …)`. The options may be left out; strings become text. */
function el(name, ...children) {
  return fill(document.createElement(name.split(".")[0]), name, children);
}

/** The same in SVG. */
function svg(name, ...children) {
  return fill(document.createElementNS(SVG, name.split(".")[0]), name, children);
}

function fill(node, name, children) {
  const [first] = children,
    isOptions = first?.constructor === Object;
  const classes = name.split(".").slice(1).join(" ");
  if (classes) node.setAttribute("class", classes);
  for (const [key, value] of Object.entries(isOptions ? first : {})) {
    if (key === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null) node.setAttribute(key, value);
  }
  const all = (isOptions ? children.slice(1) : children).flat(Infinity);
  node.append(...all.filter((child) => child !== null && child !== undefined).map(visible));
  return node;
}

/** Control characters of a text as their pictures or numbers: they would be invisible, or reorder what is around it. */
function visible(child) {
  if (typeof child !== "string") return child;
  const picture = (c) => (c === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0)));
  return child
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, picture)
    .replace(/[\u202a-\u202e\u2066-\u2069]/g, (c) => `[U+${c.charCodeAt(0).toString(16).toUpperCase()}]`);
}

/** A text of someone else's, isolated: its writing direction doesn't reach what is around it. */
const said = (text, name = "bdi") => el(name, { dir: "auto" }, text);

const NONE = "–";
const whole = (value) => (value === null ? NONE : Math.round(value).toLocaleString("en-US"));
const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;
const day = (time) => time.slice(0, 10);
const minute = (time) => `${time.slice(0, 10)} ${time.slice(11, 16)}`;

function number(value, digits = 4) {
  if (value === null) return NONE;
  return Math.abs(value) >= 1e4 ? whole(value) : value.toLocaleString("en-US", { maximumSignificantDigits: digits });
}

/** A score up to 1, which is never rounded up to 1. */
function score(value, digits = 3) {
  if (value === null) return NONE;
  return (value < 1 ? Math.floor(value * 10 ** digits) / 10 ** digits : value).toFixed(digits);
}

/** A share from 0 to 1 in percent; only none is 0 and only all is 100. */
function percent(share) {
  if (share === null || !isFinite(share)) return NONE;
  if (share > 0 && share < 0.001) return "<0.1 %";
  return `${Number((share < 1 ? Math.min(100 * share, 99.9) : 100 * share).toFixed(1))} %`;
}

function bytes(value) {
  const units = ["bytes", "KB", "MB", "GB", "TB", "PB"];
  const power = value < 1000 ? 0 : Math.min(Math.floor(Math.log10(value) / 3), units.length - 1);
  return `${number(value / 1000 ** power, 3)} ${units[power]}`;
}

function duration(seconds) {
  if (seconds === null) return NONE;
  if (seconds < 100) return `${number(seconds, 2)} s`;
  return seconds < 6000 ? `${Math.round(seconds / 60)} min` : `${number(seconds / 3600, 2)} h`;
}

/** A number after a bar; `share` is the part of the bar that is filled, from 0 to 1. */
function meter(share, text, kind = "usual") {
  const bar = el(`span.bar.${kind}`);
  bar.style.inlineSize = `${100 * Math.max(0, Math.min(1, share || 0))}%`;
  return el("span.meter", el("span.track", bar), el("span.figure", text));
}

/** A node that shows a line of text at the pointer. */
function tipped(node, text) {
  const tip = document.getElementById("tip");
  const show = (event) => {
    tip.replaceChildren(visible(text));
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 10)}px`;
  };
  for (const event of ["pointerenter", "pointermove"]) node.addEventListener(event, show);
  node.addEventListener("pointerleave", () => (tip.hidden = true));
  return node;
}

const absent = (why) => el("p.absent", why);
const intro = (...text) => el("p.intro", text);
const badge = (kind, text) => el(`span.badge.${kind}`, text);
const code = (text) => said(text, "code");
const button = (name, text, act, options = {}) => el(name, { type: "button", ...options, on: { click: act } }, text);

/** A field to type in; `act` is called with what is typed, in lower case. */
function search(label, act) {
  const input = el("input", { type: "search", placeholder: `${label} …`, "aria-label": label });
  input.addEventListener("input", () => act(input.value.trim().toLowerCase()));
  return input;
}

/** How many items of a list the page was not given, if any. */
function more(record, field, noun) {
  const left = record[`${field}_left_out`];
  return left ? el("p.hint", `The page leaves out ${plural(left, noun)}.`) : null;
}
