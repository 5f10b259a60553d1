// Numbers and their words. Nothing here touches the page.

/** What was observed between two readings of a histogram. */
export function between(earlier, later) {
  return later.map((bucket, i) => ({ ...bucket, count: bucket.count - (earlier?.[i]?.count ?? 0) }));
}

/** In seconds, taken as evenly spread inside a bucket, as Prometheus does. Null without observations. */
export function quantile(buckets, q) {
  const total = buckets.at(-1)?.count ?? 0;
  if (total <= 0) return null;
  let [below, lower] = [0, 0];
  for (const { le_seconds, count } of buckets) {
    if (count >= q * total) {
      if (le_seconds === null) return lower;
      return lower + (le_seconds - lower) * ((q * total - below) / Math.max(count - below, 1e-9));
    }
    [below, lower] = [count, le_seconds ?? lower];
  }
  return lower;
}

/** The share of observations of at most so many seconds. */
export function attained(buckets, seconds) {
  const total = buckets.at(-1)?.count ?? 0;
  if (total <= 0) return null;
  let [below, lower] = [0, 0];
  for (const { le_seconds, count } of buckets) {
    if (le_seconds === null || seconds <= le_seconds) {
      const share = le_seconds === null ? 0 : (seconds - lower) / (le_seconds - lower);
      return (below + (count - below) * share) / total;
    }
    [below, lower] = [count, le_seconds];
  }
  return 1;
}

export function milliseconds(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 120_000) return `${(ms / 1000).toFixed(1)} s`;
  return duration(ms / 1000);
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86_400)} d`;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  while (count >= 1000 && at < units.length - 1) { count /= 1000; at += 1; }
  return `${at === 0 || count >= 100 ? Math.round(count) : count.toFixed(1)} ${units[at]}`;
}

export function amount(number) {
  return number >= 10 || Number.isInteger(number)
    ? Math.round(number).toLocaleString("en")
    : number.toFixed(1);
}

export function clock(unixMs) {
  return new Date(unixMs).toLocaleTimeString("en-GB");
}

export const total = (phases) =>
  phases.queue_ms + phases.prefill_ms + phases.handoff_ms + phases.decode_ms;
