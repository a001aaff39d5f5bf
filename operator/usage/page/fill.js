// How full nodes are: ports in use towards the fullest origin, by ports of the slices that a node holds.

import { usage } from "./api.js";
import { isNetwork, plain, rfc3339, seconds } from "./format.js";

// A node that has not reported for so long is silent: nobody knows what it uses. The same time is looked at for what is in use now.
export const RECENT = 60;

// Figures of 10 seconds begin at multiples of it.
const SLOT = 10;

// The fullest origin of each node of each address, by the node's newest report of the last minute. `bound`: of pairs that are missing no
// more than this is in use, because there were too many rows to read all.
export async function fullest(now, filter, pages) {
  const to = Math.floor(now / SLOT) * SLOT;
  const { rows, more } = await usage({
    from: rfc3339(to - RECENT), to: rfc3339(to), level: "TENS", filter, order: "HIGHEST",
    by: ["ADDRESS", "NODE", "ORIGIN", "PROTOCOL"], fullest: 2, newest: true, figures: [{ measure: "IN_USE", aggregation: "MAX" }],
  }, pages);
  const found = new Map(rows.map(({ by: [address, node, origin, protocol], figures: [inUse] }) =>
    [`${address} ${node}`, { origin, protocol, inUse }]));
  return { found, bound: more ? rows.at(-1).figures[0] : 0 };
}

// End of what each node reported last; null if that was never, or too long ago.
export function lastOf(reports) {
  return new Map(reports.map(({ node, last }) => [node, last === null ? null : seconds(last)]));
}

// What is known of each holder of an address. `share` is null where ports do not limit or nobody knows.
export function judge(address, last, use, now) {
  const network = isNetwork(address.address);
  return address.holders.map((holder) => {
    const slices = holder.held + holder.draining;
    const reported = last.get(holder.node) ?? null;
    const silent = reported === null || now - reported > RECENT;
    const found = use?.found.get(`${plain(address.address)} ${holder.node}`);
    const known = use !== null && !silent;
    const inUse = known ? found?.inUse ?? 0 : null;
    const all = slices * 256;
    return {
      ...holder, slices, reported, silent, inUse, ports: network ? null : all,
      atMost: known && !found && use.bound > 0 ? use.bound : null,
      origin: known && found ? found : null,
      share: network || inUse === null || all === 0 ? null : inUse / all,
    };
  });
}

// full, over (the plan), under, idle, unknown.
export function grade(share, target) {
  if (share === null || share === undefined) return "unknown";
  if (share >= 1) return "full";
  if (target !== null && share * 100 >= target) return "over";
  return share > 0 ? "under" : "idle";
}

// "no report since 14:03:20"
export function silence(reported, moment) {
  return reported === null ? "no report for 30 days or more" : `no report since ${moment(reported)}`;
}
