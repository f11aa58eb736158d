// ---- the ranks, and the empty conversation ----
const PROMPTS = ['What is the capital of France?', 'List three tips for better sleep.', 'Write a Python function that adds two numbers.'];
const FEW = 4, NARROW_PX = 600;  // in a narrow window, a longer list of ranks is closed at first
let areRanksKnown = false, isFirst = true;  // isFirst: the list has not been shown yet

const counted = (count, noun) => `${count} ${noun}${count === 1 ? '' : 's'}`;
const range = ([start, stop]) => (stop - start === 1 ? `${start}` : `${start}-${stop - 1}`);
const percent = share => `${Math.round(100 * share)}%`;
function bytes(count) {
  const [size, unit, digits] = count >= 1e9 ? [1e9, 'GB', 2] : count >= 1e6 ? [1e6, 'MB', 1] : [1e3, 'kB', 1];
  return `${(count / size).toFixed(digits)} ${unit}`;
}
function shareOf({ comm_seconds: collectives, busy_seconds: busy }) {  // null: not measured, or nothing has run
  return collectives === null || !busy ? null : collectives / busy;
}
function rankItem(rank, tp) {
  const heads = range(rank.query_heads), held = `head${/-/.test(heads) ? 's' : ''} ${heads}, KV ${range(rank.kv_heads)}`;
  const share = tp === 1 ? null : shareOf(rank);
  const name = `${rank.replica === undefined ? '' : `replica ${rank.replica}, `}rank ${rank.rank}`;
  const item = h('li', {}, ...[name, held, bytes(rank.weight_bytes)].map(text => h('span', {}, `${text} `)));
  if (share !== null) item.append(h('span', { className: 'share' }, percent(share), h('span', { className: 'visually-hidden' }, ' in collectives')));
  item.style.setProperty('--share', percent(share ?? 0));
  return item;
}
function timeOfAll(tp, ranks) {
  if (tp === 1) return ', no collectives';
  if (ranks.some(rank => rank.comm_seconds === null)) return ', time in collectives not measured on GPUs';
  const shares = ranks.map(shareOf).filter(share => share !== null), sum = shares.reduce((total, share) => total + share, 0);
  return shares.length ? `, ${percent(sum / shares.length)} of their time in collectives` : '';
}
function showRanks({ model: name, tp, replicas = 1, dtype, context, ranks, chat_error: problem }) {
  const ofReplicas = replicas === 1 ? counted(tp, 'rank') : `${counted(replicas, 'replica')} of ${counted(tp, 'rank')}`;
  $('ranks-summary').textContent = ofReplicas + timeOfAll(tp, ranks);
  $('ranks-list').replaceChildren(...ranks.map(rank => rankItem(rank, tp)));
  if (isFirst) $('ranks').open = ranks.length <= FEW || innerWidth > NARROW_PX;
  $('ranks').hidden = isFirst = false;
  areRanksKnown = true;
  $('about').textContent = `${name} on ${ofReplicas}, ${dtype}, context of ${counted(context, 'token')}`;
  const chats = problem ? [h('p', { className: 'error' }, problem)]
    : PROMPTS.map(prompt => h('button', { type: 'button' }, prompt));
  $('prompts').replaceChildren(...chats);
}
