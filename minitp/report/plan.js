// ---- the sharding plan ----
const COLORS = '#77aadd #eedd88 #44bb99 #ffaabb #99ddff #bbcc33 #ee8866 #c9b6e4 #dddddd'.split(' ');  // after P. Tol
const rankColor = rank => COLORS[rank % COLORS.length];
const lengths = ranges => ranges.map(([start, stop]) => stop - start);
const sum = numbers => numbers.reduce((a, b) => a + b, 0);
const bytes = n => n >= 1e9 ? `${(n / 1e9).toFixed(1)} GB` : `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)} MB`;
const note = (x, y, text, attributes) => s('text', { x, y, ...attributes }, text);

function box(rank, x, y, width, text, hint) {  // one rank's part, with its number if there is room
  return [s('rect', { class: 'box', x, y, width: Math.max(width, 0.5), height: 26, rx: 5, fill: rankColor(rank) }, s('title', {}, hint)),
    note(x + width / 2, y + 17, text.length * 7 < width ? text : '', { class: 'on', 'text-anchor': 'middle', 'pointer-events': 'none' })];
}
const isWrong = (part, rank) => (data.plan.wrong ?? []).some(([name, of]) => name === part && (of === null || of === rank));
function bar(width, y, name, parts, label, hint, what) {  // parts of a whole, each as long as its share
  let from = 0;
  return [note(0, y + 12, name, { class: 'soft' }), ...parts.flatMap((part, rank) => {
    const x = from;
    from += part / (sum(parts) || 1) * width;
    return [...box(rank, x, y + 18, from - x, label(part), `rank ${rank}: ${hint(rank)}`),
      ...(isWrong(what, rank) ? [s('rect', { class: 'fault', x: x + 1, y: y + 19, width: Math.max(from - x - 2, 2), height: 24, rx: 4 })] : [])];
  })];
}
function holdersOf(plan) {  // for each KV head, the ranks that hold it
  const of = kv => plan.kv_head_ranges.flatMap(([start, stop], rank) => kv >= start && kv < stop ? [rank] : []);
  return range(plan.kv_heads).map(of);
}
function drawHeads(plan, width, gap) {  // query heads above, KV heads below, and a line from each query head to its KV head
  const sizes = lengths(plan.head_ranges).map(n => Math.max(1, n)), unit = (width - (plan.tp - 1) * gap) / sum(sizes);
  const holders = holdersOf(plan), last = new Map(), lines = [], boxes = [];
  let left = 0;
  plan.head_ranges.forEach(([start, stop], rank) => {
    const size = sizes[rank] * unit, x = left, [kvStart, kvStop] = plan.kv_head_ranges[rank] ?? [0, 0];
    const kvSize = size / Math.max(1, kvStop - kvStart), kvAt = kv => x + (kv - kvStart + 0.5) * kvSize;
    const label = size > 44 ? `rank ${rank}` : size > 12 ? String(rank) : '';
    boxes.push(note(x + size / 2, 34, label, { 'text-anchor': 'middle' }));
    for (let head = start; head < stop; head++) {
      const kv = Math.floor(head * plan.kv_heads / plan.heads), at = x + (head - start + 0.5) * unit;
      const held = kv >= kvStart && kv < kvStop, to = held ? `C${at} 84 ${kvAt(kv)} 84 ${kvAt(kv)} 100` : 'V84';
      const hint = `rank ${rank}: query head ${head} reads KV head ${kv}${held ? '' : ', which this rank does not hold'}`;
      boxes.push(...box(rank, at - unit / 2, 42, unit, `${head}`, hint));
      lines.push(s('path', { class: `reads ${held ? '' : 'lost'}`, d: `M${at} 68${to}` }));
      if (!held) boxes.push(note(at, 96, '✕', { class: 'missing', 'text-anchor': 'middle' }));
    }
    for (let kv = kvStart; kv < kvStop; kv++) {
      const at = kvAt(kv), w = Math.min(kvSize, Math.max(kvSize * 0.6, 64)), other = last.get(kv);
      boxes.push(...box(rank, at - w / 2, 100, w, `${kv}`, `KV head ${kv}, on rank ${(holders[kv] ?? []).join(', ')}`));
      if (other !== undefined) lines.push(s('path', { class: 'twice', d: `M${other} 126C${other} 146 ${at} 146 ${at} 126` }));
      last.set(kv, at);
    }
    left += size + gap;
  });
  return [...lines, ...boxes, note(0, 12, plural(plan.heads, 'query head'), { class: 'soft' }),
    note(0, 156, plural(plan.kv_heads, 'KV head'), { class: 'soft' })];
}
function drawPlan() {
  const plan = data.plan;
  $('plan-section').hidden = !plan;
  if (!plan) return;
  const gap = plan.tp > 1 ? 10 : 0, least = sum(lengths(plan.head_ranges)) * 13 + (plan.tp - 1) * gap;
  const width = Math.max($('drawing').clientWidth || 800, least), held = plan.bytes_per_rank ?? [];
  const span = ranges => rank => `${ranges[rank][0]} to ${ranges[rank][1] - 1}`, height = held.length ? 344 : 284;
  $('drawing').replaceChildren(s('svg', { width, height, viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': 'The sharding plan: heads, FFN columns and vocabulary by rank' },
    drawHeads(plan, width, gap),
    bar(width, 176, plural(plan.ffn, 'FFN column'), lengths(plan.ffn_ranges), count, span(plan.ffn_ranges), 'ffn'),
    bar(width, 236, `${count(plan.vocab)} rows of the vocabulary`, lengths(plan.vocab_ranges), count, span(plan.vocab_ranges), 'vocab'),
    !held.length ? [] : bar(width, 296, `${bytes(sum(held))} of weights${plan.tp > 1 ? ', all ranks together' : ''}`, held, bytes, rank => bytes(held[rank]))));
  const shared = holdersOf(plan).flatMap((ranks, kv) => ranks.length > 1 ? [`${kv} on ranks ${ranks.join(', ')}`] : []);
  const which = shared.length > 8 ? `${shared.length} of ${plan.kv_heads} are held more than once` : shared.join('; ');
  $('copies').textContent = !shared.length ? '' :
    `Dashed lines join the copies of a KV head that several ranks hold because their query heads read it: ${which}.`;
  $('plan-what').textContent = (plan.tp > 1 ? 'Each rank has a color.' : 'One rank holds everything.')
    + ' A line leads from each query head to the KV head that it reads.';
}
function hintAtScrolling() {
  const box = $('tensors').parentNode;
  $('tensors-hint').hidden = box.scrollWidth <= box.clientWidth + 1;
}
function wrongTensors() {  // general name and rank -> the layers in which the tensor is wrong; null for the plan itself
  const found = new Map((data.plan.wrong ?? []).flatMap(([name, rank]) =>
    (rank === null ? range(data.plan.tp) : [rank]).map(of => [`${name} ${of}`, null])));
  for (const { row, col, rank, ok } of cells) if (!ok && isTensor(row, col)) {
    const key = `${stepOf(row, col)} ${rank}`;
    found.set(key, [...(found.get(key) ?? []), ...(isWide(row) ? [] : [row - first])]);
  }
  return found;
}
function layersText(layers) {
  if (!layers?.length) return '';
  return layers.length > 3 ? `${layers.length} layers` : `layer${layers.length > 1 ? 's' : ''} ${layers.join(', ')}`;
}
function drawTensors() {
  const plan = data.plan, ranks = range(plan?.tp ?? 0);
  if (!plan?.tensors?.length) return;
  const swatch = rank => h('i', { style: `background:${rankColor(rank)}` }), found = wrongTensors();
  const head = headings(['tensor', 'count', 'shape', 'split axis', ...ranks.map(rank => [swatch(rank), `rank ${rank}`])]);
  const lines = plan.tensors.map(({ name, count, shape, axis, ranges, replicated }) => {
    const whole = replicated || axis === null, part = rank => whole ? 'all' : ranges[rank]?.join(':') ?? '–';
    const parts = ranks.map(rank => {
      const bad = found.has(`${name} ${rank}`), where = layersText(found.get(`${name} ${rank}`));
      return bad ? h('td', { class: 'wrong' }, `✕ ${part(rank)}`, where ? h('small', {}, where) : '') : td(part(rank), { class: whole ? 'soft' : null });
    });
    const marked = ranks.filter(rank => found.has(`${name} ${rank}`));
    const where = marked.length ? h('small', { class: 'wrong' }, `✕ rank ${marked.join(', ')}`) : '';  // where the table scrolls sideways
    return h('tr', { class: marked.length ? 'marked' : null }, h('td', { class: 'name' }, h('bdi', {}, name), where), td(count), td(shape.join(' × ')), td(whole ? '–' : axis), parts);
  });
  $('tensors').append(head, h('tbody', {}, lines));
  hintAtScrolling();
}
