// ---- the numbers of one step ----
const td = (content, attributes) => h('td', attributes, h('bdi', {}, content));
const headings = names => h('thead', {}, h('tr', {}, names.map(name => h('th', { scope: 'col' }, name))));
const indexText = index => index?.join(', ') || '–';

function errorTable(cell) {
  const errors = [['local', cell.local], [comparing ? 'difference' : 'total', cell.total]].filter(([, error]) => error);
  const lines = [
    ['relative error', error => brief(error.relative)], ['its bound', error => brief(error.bound)],
    ['share of its bound', error => brief(error.share)], ['largest absolute', error => brief(error.absolute)],
    ['its bound', error => brief(error.absoluteBound)], ['at index', error => indexText(error.index)],
  ].map(([label, text]) => [label, errors.map(([, error]) => text(error))]);
  const told = lines.filter(([, texts]) => texts.some(text => text !== '–'));
  return h('table', {}, headings(['', ...errors.map(([name]) => name)]), h('tbody', {},
    told.map(([label, texts]) => h('tr', {}, h('th', { scope: 'row' }, label), texts.map(text => td(text))))));
}
function worstTable(cell) {
  const axes = data.axes[stepOf(cell.row, cell.col)]?.split(' ');
  const lines = cell.worst.map(([index, value, expected]) => h('tr', {}, td(indexText(index)), td(full(real(value))),
    td(full(real(expected))), td(brief(real(value) - real(expected)))));
  return [h('h3', {}, 'Worst elements'), h('div', { class: 'scroll' }, h('table', {},
    headings([axes ? `[${axes.join(', ')}]` : 'index', ...(comparing ? ['B', 'A'] : ['value', 'expected']), 'difference']), h('tbody', {}, lines)))];
}
function ranksTable() {
  const shown = cellAt(state), lines = views.flatMap((view, v) => {
    const cell = view.rank === 'worst' ? null : cellAt({ ...state, view: v });
    if (!cell) return [];
    const button = h('button', { type: 'button', 'aria-label': `show rank ${view.rank}`, onclick: () => show({ view: v }) }, view.label);
    return h('tr', { class: cell === shown ? 'here' : null }, h('td', {}, button), td(brief(cell.local?.relative)),
      td(brief(cell.bounded?.share)), td(brief(cell.total?.relative)), td(cell.ok ? '✓' : '✕', { class: cell.ok ? 'ok' : 'wrong' }));
  });
  if (lines.length < 2) return [];
  return [h('h3', {}, 'The same step on each rank'),
    h('table', {}, headings(['rank', 'local', 'of bound', 'total', '']), h('tbody', {}, lines))];
}
function wrongButtons() {  // buttons to the wrong steps before and after this one
  const here = order({ ...state, rank: cellAt(state)?.rank });
  const before = wrong.findLast(cell => order(cell) < here), after = wrong.find(cell => order(cell) > here);
  const button = (cell, text) => h('button', { type: 'button', disabled: cell ? null : '',
    onclick: () => show({ ...placeOf(cell), view: viewOf(cell) }, true) }, text);
  if (!before && !after) return [];
  return [h('div', { class: 'steps' }, button(before, '‹ previous wrong'), button(after, 'next wrong ›'))];
}
function explained(step) {  // the step's sentence, formula, shape and operation
  const [shape, formula, operation, sentence] = data.explained?.[step] ?? [];
  if (!shape) return [];
  return [h('p', { class: 'sentence' }, sentence), h('p', { class: 'formula' }, h('span', {}, formula)),
    h('p', { class: 'formula soft' }, h('span', {}, shape), h('span', {}, operation))];
}
let folded = true;  // on a phone the sheet starts as one line
function fold(now) {
  folded = now;
  $('detail').classList.toggle('folded', folded);
  const button = document.querySelector('#detail .fold');
  button?.setAttribute('aria-expanded', !folded);
  button?.setAttribute('aria-label', folded ? 'show the numbers' : 'hide the numbers');
}
function drawDetail() {
  const cell = cellAt(state), name = h('h2', { class: 'name' }, h('bdi', {}, breakable(fullName(state))));
  const mark = !cell ? '' : h('span', { class: cell.ok ? 'mark ok' : 'mark wrong', 'aria-hidden': 'true' }, cell.ok ? '✓' : '✕');
  const bar = h('div', { class: 'sheet-bar' }, mark, name,
    h('button', { type: 'button', class: 'fold', onclick: () => fold(!folded) }, h('i')),
    h('button', { type: 'button', class: 'close', 'aria-label': 'close', onclick: () => { $('detail').hidden = true; } }, '×'));
  const status = cell && (cell.ok ? '✓ within bounds' : cell === guilty ? `✕ the first ${fault} step` : '✕ out of bounds');
  const rank = cell && rankName(cell.rank) + (views[state.view].rank === 'worst' ? ' (the worst)' : '');
  const numbers = !cell ? [h('p', { class: 'soft' }, 'Not recorded.')] : [
    h('p', { class: 'tags' }, h('span', { class: cell.ok ? 'ok' : 'wrong' }, status), h('span', {}, rank),
      h('span', { class: 'soft' }, h('bdi', {}, cell.kind)))];
  if (cell?.note) numbers.push(h('p', { class: 'note' }, h('bdi', {}, cell.note)));
  numbers.push(...explained(stepOf(state.row, state.col)));
  if (cell) numbers.push(h('h3', {}, 'Errors'), errorTable(cell), ...(cell.worst.length ? worstTable(cell) : []), ...ranksTable());
  $('detail').hidden = false;
  $('detail').replaceChildren(bar, ...numbers, ...wrongButtons(), ...(cell ? [h('p', { class: 'hint keys' }, 'Arrow keys move through the map.')] : []));
  fold(folded);
}
