// Questions to the collector.

import { token } from "./session.js";

// Why there is no answer. `refused`: the token is not (or no longer) good.
export class Failure extends Error {
  constructor(message, refused = false) {
    super(message);
    this.refused = refused;
  }
}

// Longer than the collector takes before it gives up.
const PATIENCE = 30_000;

export async function ask(query, variables = {}, by = token()) {
  let response;
  try {
    response = await fetch("v1/graphql", {
      method: "POST",
      headers: { "content-type": "application/json", authorization: `Bearer ${by}` },
      body: JSON.stringify({ query, variables }),
      cache: "no-store",
      credentials: "omit",
      signal: AbortSignal.timeout(PATIENCE),
    });
  } catch (error) {
    const late = error.name === "TimeoutError";
    throw new Failure(late ? "The collector does not answer in time." : "The collector cannot be reached.");
  }
  if (response.status === 401) throw new Failure("The token is refused.", true);
  if (!response.ok) {
    const text = (await response.text().catch(() => "")).trim().slice(0, 200);
    throw new Failure(`The collector answers ${response.status}${text ? `: ${text}` : ""}.`, response.status === 403);
  }
  const answer = await response.json().catch(() => ({}));
  // Of several questions those that have an answer come with it, the others with an error: a part would look like the whole.
  if (!answer.data || answer.errors?.length) {
    const first = answer.errors?.[0]?.message ?? "no data";
    throw new Failure(`The collector cannot answer: ${first}.`);
  }
  return answer.data;
}

const USAGE = `query($from: Time!, $to: Time!, $step: Int, $level: Level, $filter: Filter!, $by: [Dimension!]!,
  $newest: Boolean!, $fullest: Int, $figures: [Figure!]!, $order: Order!, $first: Int!, $after: String) {
  usage(from: $from, to: $to, step: $step, level: $level, filter: $filter, newest: $newest, by: $by, fullest: $fullest,
    figures: $figures, order: $order, first: $first, after: $after) { until nodes { by at figures } pageInfo { hasNextPage endCursor } } }`;

// All rows of a question, or those of so many pages; `more`: there are others.
export async function usage(question, pages = 5) {
  const rows = [];
  let after = null;
  let until = null;
  for (let page = 0; page < pages; page += 1) {
    const { usage: part } = await ask(USAGE, { step: null, newest: false, fullest: null, order: "GROUP", first: 1000, ...question, after });
    rows.push(...part.nodes);
    until = part.until;
    if (!part.pageInfo.hasNextPage || part.nodes.length < 1) return { rows, until, more: false };
    after = part.pageInfo.endCursor;
    // Who asks for fewer than a page wants no second one.
    if (question.first) break;
  }
  return { rows, until, more: true };
}
