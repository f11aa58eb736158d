// ---- a drawing of one layer: which step feeds which, and where the ranks exchange arrays ----
const LANES = 6, ROW = 23, BOX = 18, WIDE = 190, RAIL = 9, EDGE = 22;  // lanes across; sizes in CSS pixels
const one = step => [[step, 0, LANES]];
const side = (...steps) => steps.map((step, i) => [step, i * LANES / steps.length, (i + 1) * LANES / steps.length]);
const meeting = name => [[null, 0, LANES, name]];
const BLOCKS = {  // rows of [step, first lane, lane after the last], in the order of computation
  before: [one('block_table'), side('tokens', 'positions'), one('embed_partial'), meeting('all-reduce'), one('embed')],
  attn: [one('attn.norm'), side('attn.q', 'attn.k', 'attn.v'), side('attn.q_norm', 'attn.k_norm', null).slice(0, 2),
    side('attn.q_rope', 'attn.k_rope', null).slice(0, 2), side(null, 'attn.k_cache', 'attn.v_cache').slice(1),
    [['attn.scores', 0, 4]], [['attn.probs', 0, 4]], one('attn.context'), one('attn.out_partial'), meeting('all-reduce'),
    one('attn.out'), one('attn.post_norm'), one('attn.residual')],
  mlp: [one('mlp.norm'), one('mlp.router'), one('mlp.experts'), side('mlp.gate', 'mlp.up'), one('mlp.act'),
    one('mlp.out_partial'), meeting('all-reduce'), one('mlp.out'), one('mlp.post_norm'), one('mlp.residual')],
  after: [one('final_norm'), one('logits_partial'), meeting('all-gather'), one('logits')],
};
const boxes = new Map();  // step -> its rectangle and text, a <g>
const kinds = new Map(cells.map(cell => [stepOf(cell.row, cell.col), cell.kind]));
let shownLayer = 0;  // the layer that a click on one of its boxes selects

const tensors = new Set([...weights, ...Object.values(beside)]);  // general names
const planned = name => data.plan?.tensors?.find(tensor => tensor.name === name);
function explainedBy(step) {  // [shape, formula, operation, sentence, source]; none for a name that is not one of minitp's
  if (!tensors.has(step)) return data.explained?.[step];
  const shape = planned(step)?.shape;
  return data.explained?.weights && [shape ? `[${shape.join(', ')}]` : '', ...data.explained.weights.slice(1)];
}
function explanation(step) {  // lines of plain text
  const [shape, formula, operation, sentence, source] = explainedBy(step) ?? [];
  return sentence ? [sentence, formula, [shape, operation, source].filter(Boolean).join('  ')] : [];
}
function placeOfStep(step) {
  const before = data.before.indexOf(step), after = data.after.indexOf(step);
  if (before >= 0) return { row: before, col: wide };
  return after >= 0 ? { row: end + after, col: wide } : { row: first + shownLayer, col: weights.length + data.steps.indexOf(step) };
}
function strip(x, y, width) {  // a split array: a piece in each rank's color
  const pieces = Math.min(data.tp ?? 1, 16);
  return pieces < 2 ? '' : range(pieces).map(rank => s('rect', { class: 'piece', x: x + rank * width / pieces, y, width: width / pieces - 1,
    height: 2.5, style: `fill:${rankColor(rank)}` }));
}
function drawBox(step, x, y, width) {
  const kind = kinds.get(step), short = step.slice(step.indexOf('.') + 1);
  const group = s('g', { class: `step ${kind ?? ''}`, 'data-step': step, onclick: () => show(placeOfStep(step)) },
    s('rect', { x, y, width, height: BOX, rx: 3 }),
    kind === 'sharded' ? strip(x + 2, y + BOX - 3.5, width - 4) : '',
    s('text', { x: x + width / 2, y: y + (kind === 'sharded' ? 11 : 13), 'text-anchor': 'middle' }, short));
  group.addEventListener('pointermove', event => tip(event, [step, ...explanation(step)].join('\n')));
  group.addEventListener('pointerleave', () => tip());
  boxes.set(step, group);
  return group;
}
function drawBlock(name, top) {  // a block's elements, the y below them, and where it reads the residual stream or adds to it
  const known = step => data.before.includes(step) || data.after.includes(step) || data.steps.includes(step);
  const lines = BLOCKS[name].map(row => row.filter(([step, , , meets]) => meets || known(step))).filter(row => row.length);
  if (!lines.some(row => row.some(([step]) => step))) return { drawn: [], y: top, joins: [] };
  const lane = (WIDE - EDGE) / LANES, last = Array(LANES).fill(null), edges = [], drawn = [], joins = [];
  let y = top;
  for (const row of lines) {
    for (const [step, from, to, meets] of row) {
      const x = EDGE + from * lane + 2, width = (to - from) * lane - 4, item = { x, width, y };
      for (const above of new Set(last.slice(from, to))) if (above) {  // an edge from the last box in each of the lanes
        const at = above.width < width ? above.x + above.width / 2 : x + width / 2;
        edges.push(s('path', { class: 'edge', d: `M${at} ${above.y + BOX}V${y}` }));
      }
      last.fill(step === 'positions' || step === 'block_table' ? null : item, from, to);  // attention reads these two
      if (meets) drawn.push(s('rect', { class: 'meets', x: 1, y, width: WIDE - 2, height: BOX, rx: BOX / 2 }),
        s('text', { class: 'meets', x: WIDE / 2, y: y + 13, 'text-anchor': 'middle' }, `${meets}: all ranks`));
      else drawn.push(drawBox(step, x, y, width));
      if (/norm$/.test(step) && row === lines[0]) joins.push({ y: y + BOX / 2, reads: true });
      if (/residual$|^embed$/.test(step)) joins.push({ y: y + BOX / 2, reads: step === 'embed' });
    }
    y += ROW;
  }
  return { drawn: [...edges, ...drawn], y, joins };
}
function drawLayer() {
  $('layer').hidden = !data.steps.some(step => data.explained?.[step]);
  $('board').classList.toggle('plain', $('layer').hidden);
  if ($('layer').hidden) return;
  const parts = [], joins = [];
  let y = 2, frame = [0, 0];
  for (const name of Object.keys(BLOCKS)) {
    if (name === 'attn') frame[0] = (y += y > 2 ? 12 : 6) - 7;
    if (name === 'mlp') y += 6;
    const block = drawBlock(name, y);
    y = block.y;
    if (name === 'mlp') { frame[1] = y; y += 12; }
    parts.push(...block.drawn);
    joins.push(...block.joins);
  }
  const rail = joins.length > 1 ? [s('path', { class: 'rail', d: `M${RAIL} ${joins[0].y}V${joins.at(-1).y}` }), ...joins.flatMap(({ y: at, reads }) => [
    s('path', { class: 'rail', d: `M${RAIL} ${at}H${EDGE + 2}` }),
    reads ? '' : s('circle', { class: 'rail', cx: RAIL, cy: at, r: 6 }),
    reads ? '' : s('path', { class: 'rail', d: `M${RAIL - 3} ${at}h6m-3 -3v6` })])] : [];
  $('layer').replaceChildren(h('h3', {}, `One of ${plural(data.layers, 'layer')}`),
    s('svg', { viewBox: `0 0 ${WIDE} ${y}`, width: WIDE, height: y, role: 'img', 'aria-label': 'The steps of a layer in order, and its all-reduces' },
      s('rect', { class: 'frame', x: 0.5, y: frame[0], width: WIDE - 1, height: frame[1] - frame[0], rx: 8 }), rail, parts),
    ...(data.tp > 1 ? [layerLegend()] : []));
}
function layerLegend() {
  const sample = (kind, text) => h('li', {}, s('svg', { width: 26, height: 13 }, s('g', { class: `step ${kind}` },
    s('rect', { x: 1, y: 1, width: 24, height: 11, rx: 2 }), kind === 'sharded' ? strip(3, 7, 20) : '')), text);
  return h('ul', {}, sample('replicated', 'the same on all ranks'), sample('sharded', 'split over the ranks'), sample('partial', 'a term of a sum'));
}
function markLayer() {  // highlight the selected step, and the wrong steps of the selected layer
  if (!isWide(state.row)) shownLayer = state.row - first;
  const name = stepOf(state.row, state.col), selected = data.readers?.[name] ?? name;  // of a tensor, the step that reads it
  for (const [step, group] of boxes) {
    group.classList.toggle('now', step === selected);
    group.classList.toggle('wrong', cellAt({ ...state, ...placeOfStep(step) })?.ok === false);
  }
}
