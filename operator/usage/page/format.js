// Numbers and times as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

// 6,144; below ten a mean keeps a digit.
export function number(value) {
  return (value < 10 ? fine : whole).format(value);
}

// Rounded down, so that 100 % means all of it.
export function percent(share) {
  const of = Math.floor(share * 100 + 1e-9);
  return of === 0 && share > 0 ? "under 1 %" : `${of} %`;
}

export function count(number, one, many = `${one}s`) {
  return `${whole.format(number)} ${number === 1 ? one : many}`;
}

// 14:03:20, with the day where it is another one than that of `now`; seconds since the epoch.
export function moment(at, now) {
  const date = new Date(at * 1000);
  const time = date.toLocaleTimeString("en-GB");
  const day = (it) => it.toLocaleDateString("en-CA");
  return now === undefined || day(date) === day(new Date(now * 1000)) ? time : `${day(date)} ${time}`;
}

export function seconds(text) {
  return Date.parse(text) / 1000;
}

export function rfc3339(at) {
  return new Date(at * 1000).toISOString().replace(".000", "");
}

// Whether it is a /64, whose slices are numbers of nodes: others have ports.
export function isNetwork(address) {
  return address.includes("/");
}

// Of a slice of an address that has ports.
export function ports(first, last) {
  return `${first * 256} to ${last * 256 + 255}`;
}

// A, B, … Z, AA, …: short names of nodes.
export function letters(at) {
  const last = String.fromCharCode(65 + (at % 26));
  return at < 26 ? last : letters(Math.floor(at / 26) - 1) + last;
}

// As figures have it: of a /64 its first address.
export function plain(address) {
  return address.replace(/\/64$/, "");
}

export function origin(name, protocol) {
  return `${name || "other origins"} ${protocol}`;
}
