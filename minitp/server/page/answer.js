// ---- an answer ----
const DRAW_MS = 50, COPIED_MS = 1500, DOT = '\u00a0· ';

function addMessage(role, ...children) {
  const article = h('article', { className: role, ariaLabel: role === 'user' ? 'You' : 'Model' }, ...children);
  $('log').append(article);
  return article;
}
const isAtEnd = () => $('log').scrollHeight - $('log').scrollTop - $('log').clientHeight < 40;
const goToEnd = () => { $('log').scrollTop = $('log').scrollHeight; };
function scrollAlong(change) {  // stays at the end unless the reader has scrolled up
  const atEnd = isAtEnd();
  change();
  if (atEnd) goToEnd();
}
let wasAtEnd = true;  // the position before the window or the box changed its size
$('log').addEventListener('scroll', () => { wasAtEnd = isAtEnd(); });
new ResizeObserver(() => { if (wasAtEnd) goToEnd(); }).observe($('log'));

const seconds = ms => `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
const perSecond = (count, ms) => (count / Math.max(ms, 1) * 1000).toFixed(1);
const statsLine = (tokens, speed, ...more) => [counted(tokens, 'token'), `${speed} tok/s`, ...more].join(DOT);
class Answer {  // the text and the times of an answer while it arrives, and the line of numbers below it
  constructor() {
    this.body = h('div', { className: 'text' });
    this.stats = h('p', { className: 'stats' });
    this.article = addMessage('assistant', this.body, h('div', { className: 'below' }, this.stats));
    Object.assign(this, { markdown: new Markdown(this.body), text: '', drawn: '' });
    Object.assign(this, { pieces: 0, sent: performance.now(), first: 0, last: 0 });
  }
  add(piece) {
    this.text += piece;
    this.last = performance.now();
    if (!this.pieces++) this.first = this.last;  // a piece is one token, except for rare characters of several tokens
  }
  draw() {
    scrollAlong(() => {
      if (this.text !== this.drawn) this.markdown.show(this.drawn = this.text, true);
      this.stats.textContent = this.progress();
    });
  }
  finish(stats) {
    scrollAlong(() => {
      this.markdown.show(this.text, false);
      this.stats.textContent = stats;
      if (!this.text) return;
      texts.set(this.article, this.text);
      const buttons = [['copy', 'Copy'], ['again', 'Regenerate']].map(([kind, name]) =>
        h('button', { type: 'button', className: `small ${kind}` }, name));
      this.stats.after(...buttons);
    });
  }
  progress() {
    const now = performance.now();
    if (!this.pieces) return `waiting for the first token, ${seconds(now - this.sent)}`;
    return statsLine(this.pieces, perSecond(this.pieces - 1, now - this.first), this.firstToken());
  }
  firstToken() { return this.pieces ? `first token ${seconds(this.first - this.sent)}` : 'an empty answer'; }
  summary({ usage, reason }, most) {
    const tokens = usage.completion_tokens;
    // The time from the first token to the last; an answer that came at once has only its total time.
    const speed = this.last > this.first ? perSecond(tokens - 1, this.last - this.first)
      : perSecond(tokens, performance.now() - this.sent);
    const cut = reason !== 'length' ? [] : [`cut off${tokens === most ? ' at max tokens' : ': the context is full'}`];
    return statsLine(tokens, speed, this.firstToken(), `prompt of ${counted(usage.prompt_tokens, 'token')}`, ...cut);
  }
}

// ---- copying ----
const texts = new WeakMap();  // the raw text of each complete answer
async function copy(button) {
  const block = button.closest('.code'), text = block ? block.querySelector('code').textContent : texts.get(button.closest('article'));
  const isCopied = await navigator.clipboard?.writeText(text).then(() => true, () => false) || copyFromBox(text);
  button.textContent = isCopied ? 'Copied' : 'Not copied';
  setTimeout(() => { button.textContent = 'Copy'; }, COPIED_MS);
}
function copyFromBox(text) {  // over plain http, browsers have a clipboard only for pages from this machine
  const box = h('textarea', { className: 'visually-hidden', value: text }), before = document.activeElement;
  document.body.append(box);
  box.select();
  const isCopied = document.execCommand('copy');
  box.remove();
  before?.focus();
  return isCopied;
}
